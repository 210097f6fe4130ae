"""Every layout computes what one process computes: per-step loss and gradient norm, as metrics.jsonl has them."""

import pytest

from megadit.training.metrics import read_metrics
from tests.parity.layouts import CONFIG, LAYOUTS
from tests.ranks import train_on


def run(folder, world_size, *overrides):
    """(losses, gradient norms) of a run in `folder`."""
    results = train_on(world_size, "--config", CONFIG, f"run.dir={folder}", *overrides)
    assert [status for status, _ in results] == [0] * world_size
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return run(tmp_path_factory.mktemp("oracle") / "run", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_layouts_agree_with_one_process(layout, oracle, tmp_path):
    world_size, overrides = LAYOUTS[layout]
    losses, norms = run(tmp_path / "run", world_size, *overrides)
    assert losses == pytest.approx(oracle[0], rel=1e-9, abs=0)
    assert norms == pytest.approx(oracle[1], rel=1e-9, abs=0)


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_float32_zero_1_agrees_with_the_oracle(layout, oracle, tmp_path):
    world_size, overrides = LAYOUTS.get(layout, (1, []))
    losses, norms = run(tmp_path / "run", world_size, "run.dtype=float32", "zero.stage=1", *overrides)
    assert losses == pytest.approx(oracle[0], rel=2e-5, abs=0)
    assert norms == pytest.approx(oracle[1], rel=2e-5, abs=0)
