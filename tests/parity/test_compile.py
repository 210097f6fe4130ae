"""Compiled blocks compute the same, also with collectives inside the graph."""

import pytest

from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_on

CONFIG = "tests/configs/tiny.yaml"


@pytest.mark.drill
@pytest.mark.parametrize(("world_size", "overrides"), [(1, []), (2, ["parallel.tensor=2"]), (2, ["parallel.expert=2"])])
def test_compiled_blocks_agree_with_eager_ones(world_size, overrides, tmp_path):
    curves = []
    for compiled in ("true", "false"):
        folder = tmp_path / compiled
        command = ["--config", CONFIG, "run.steps=3", f"run.compile={compiled}", f"run.dir={folder}", *overrides]
        assert [status for status, _ in train_on(world_size, *command)] == [0] * world_size
        lines = read_metrics(folder / METRICS_FILE)
        curves.append([line["loss"] for line in lines] + [line["grad_norm"] for line in lines])
    assert curves[0] == pytest.approx(curves[1], rel=1e-9, abs=0)
