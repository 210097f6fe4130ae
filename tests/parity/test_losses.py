"""What a training writes is the same in every layout: losses and gradient norms of metrics.jsonl, by the real entry."""

import pytest

from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_on
from tests.tiers import slow_but

CONFIG = "tests/configs/tiny.yaml"
FLOAT32 = ["run.dtype=float32"]
CASES = {  # overrides on four processes, and how far the numbers may be from one process's in float64
    "tensor2_expert2_sequence": (["parallel.tensor=2", "parallel.expert=2", "parallel.sequence=true"], 1e-9),
    "pipeline2_expert2_zbv": (["parallel.pipeline=2", "parallel.expert=2", "parallel.schedule=zbv"], 1e-9),
    "pipeline2_zero1": (["parallel.pipeline=2", *FLOAT32, "zero.stage=1"], 2e-5),
    "expert2_zero2": (["parallel.expert=2", *FLOAT32, "zero.stage=2"], 2e-5),
}


def run(folder, world_size, *overrides):
    """(losses, gradient norms) of a run in `folder`."""
    results = train_on(world_size, "--config", CONFIG, f"run.dir={folder}", *overrides)
    assert [status for status, _ in results] == [0] * world_size, results
    lines = read_metrics(folder / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, 9))
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return run(tmp_path_factory.mktemp("oracle") / "run", 1)


@pytest.mark.parametrize("case", slow_but({"tensor2_expert2_sequence"}, CASES))
def test_a_training_in_another_layout_writes_the_same_numbers(case, oracle, tmp_path):
    overrides, tolerance = CASES[case]
    losses, norms = run(tmp_path / "run", 4, *overrides)
    assert losses == pytest.approx(oracle[0], rel=tolerance, abs=0)
    assert norms == pytest.approx(oracle[1], rel=tolerance, abs=0)
