"""bf16 parameters with float32 masters learn as float32 ones do."""

from statistics import mean

import pytest

from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_on

# An eighth of the example's rate. At 1.5e-3 these steps end in the warm-up's roughest part, where float32 runs
# whose weights differ by a thousandth, less than bf16 rounds, are up to two percent apart by themselves.
RATE = "optim.lr=5e-4"
QUIET = ["log.evaluate_every=0", "log.sample_every=0", "log.tensorboard=false", "checkpoint.every=1000"]
LAYOUTS = {
    "tensor2_expert2": ["parallel.tensor=2", "parallel.expert=2"],
    "pipeline2_expert2": ["parallel.pipeline=2", "parallel.expert=2"],
    "data4": [],
}


def losses(folder, world_size, *overrides):
    """Of 50 steps on digits."""
    command = [
        "--config",
        "examples/configs/digits.yaml",
        "run.steps=50",
        RATE,
        f"run.dir={folder}",
        *QUIET,
        *overrides,
    ]
    results = train_on(world_size, *command)
    assert [status for status, _ in results] == [0] * world_size, results
    return [line["loss"] for line in read_metrics(folder / METRICS_FILE)]


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("float32") / "run", 1, "run.dtype=float32")


@pytest.mark.drill
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_end_within_two_percent_of_float32(layout, float32, tmp_path):
    bfloat16 = losses(tmp_path / "run", 4, "run.dtype=bfloat16", *LAYOUTS[layout])
    assert len(bfloat16) == len(float32) == 50
    assert bfloat16 != float32
    assert mean(float32[-10:]) < 0.9 * float32[0], "nothing was learned"
    assert mean(bfloat16[-10:]) == pytest.approx(mean(float32[-10:]), rel=0.02)
