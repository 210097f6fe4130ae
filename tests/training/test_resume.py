"""A run that is killed goes on bit for bit, by the same command."""

import pytest

from megadit.checkpoint import latest
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_and_kill, train_on

LAYOUTS = {
    "one_oracle": (1, ["zero.stage=0"]),
    "one": (1, ["zero.stage=1", "run.dtype=float32"]),
    "tensor2_expert2": (
        4,
        ["parallel.tensor=2", "parallel.expert=2", "zero.stage=1", "run.dtype=float32"],
    ),
    "pipeline2_data2": (4, ["parallel.pipeline=2", "zero.stage=1", "run.dtype=float32"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_after_step_13_it_repeats_the_uninterrupted_losses(layout, tmp_path):
    world_size, overrides = LAYOUTS[layout]
    command = ["--config", "tests/configs/tiny.yaml", "run.steps=20", "checkpoint.every=10", *overrides]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert [status for status, _ in train_on(world_size, *command, f"run.dir={uninterrupted}")] == [0] * world_size

    def steps_done():
        path = killed / METRICS_FILE
        return len(read_metrics(path)) if path.exists() else 0

    train_and_kill(world_size, lambda: steps_done() >= 13, *command, f"run.dir={killed}")
    assert 13 <= steps_done() < 20, "the kill came too late to show anything"
    assert [status for status, _ in train_on(world_size, *command, f"run.dir={killed}")] == [0] * world_size

    expected, resumed = (read_metrics(folder / METRICS_FILE) for folder in (uninterrupted, killed))
    assert [line["step"] for line in resumed] == list(range(1, 21))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in resumed] == [line[key] for line in expected]
    for folder in (uninterrupted, killed):
        assert latest(folder / "checkpoints").name == "step_00000020"


def test_a_finished_run_trains_nothing(tmp_path):
    command = ["--config", "tests/configs/tiny.yaml", f"run.dir={tmp_path / 'run'}"]
    train_on(1, *command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ((status, errors),) = train_on(1, *command)
    assert status == 0
    assert "is finished: step 8 of 8" in errors
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(["run.dtype=float64", "zero.stage=0"], 1e-9), (["run.dtype=float32", "zero.stage=1"], 2e-5)],
)
def test_a_run_goes_on_in_another_layout(precision, tolerance, tmp_path):
    command = ["--config", "tests/configs/tiny.yaml", *precision]
    train_on(1, *command, "run.steps=9", f"run.dir={tmp_path / 'straight'}")
    moved = f"run.dir={tmp_path / 'moved'}"
    tensor_expert = ["parallel.tensor=2", "parallel.expert=2"]
    for steps, world_size, layout in (
        (3, 4, tensor_expert),
        (6, 4, ["parallel.pipeline=2"]),
        (9, 2, ["parallel.expert=2"]),
    ):
        results = train_on(world_size, *command, f"run.steps={steps}", moved, *layout)
        assert [status for status, _ in results] == [0] * world_size
    expected, found = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("straight", "moved"))
    for key in ("loss", "grad_norm"):
        values = [line[key] for line in found]
        assert values == pytest.approx([line[key] for line in expected], rel=tolerance, abs=0)
