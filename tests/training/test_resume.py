"""A run that is killed goes on bit for bit, by the same command."""

import math

import pytest

from megadit.checkpoint import latest, load_tensors
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_and_kill, train_on
from tests.tiers import slow_but

LAYOUTS = {
    "one_oracle": (1, ["zero.stage=0"]),
    "one": (1, ["zero.stage=1", "run.dtype=float32"]),
    "tensor2_expert2": (
        4,
        ["parallel.tensor=2", "parallel.expert=2", "zero.stage=1", "run.dtype=float32"],
    ),
    "pipeline2_data2": (4, ["parallel.pipeline=2", "zero.stage=1", "run.dtype=float32"]),
    "interleaved_zero2_bfloat16": (
        4,
        ["parallel.pipeline=2", "parallel.schedule=interleaved", "zero.stage=2", "run.dtype=bfloat16"],
    ),
}


@pytest.mark.parametrize("layout", slow_but({"one"}, LAYOUTS))
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

    def changes():
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = changes()
    ((status, errors),) = train_on(1, *command)
    assert status == 0
    assert "is finished: step 8 of 8" in errors
    assert changes() == before


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        (["run.dtype=float64", "zero.stage=0"], 1e-9),
        pytest.param(["run.dtype=float32", "zero.stage=1"], 2e-5, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_another_layout(precision, tolerance, tmp_path):
    command = ["--config", "tests/configs/tiny.yaml", *precision]
    train_on(1, *command, "run.steps=9", f"run.dir={tmp_path / 'straight'}")
    moved = f"run.dir={tmp_path / 'moved'}"
    tensor_expert = ["parallel.tensor=2", "parallel.expert=2"]
    for steps, world_size, layout in (
        (3, 4, tensor_expert),
        (6, 4, ["parallel.pipeline=2", "parallel.schedule=zbv"]),
        (9, 2, ["parallel.expert=2"]),
    ):
        results = train_on(world_size, *command, f"run.steps={steps}", moved, *layout)
        assert [status for status, _ in results] == [0] * world_size
    expected, found = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("straight", "moved"))
    for key in ("loss", "grad_norm"):
        values = [line[key] for line in found]
        assert values == pytest.approx([line[key] for line in expected], rel=tolerance, abs=0)


def test_a_flipped_bit_in_a_checkpoint_is_refused(tmp_path):
    command = ["--config", "tests/configs/tiny.yaml", f"run.dir={tmp_path / 'run'}"]
    train_on(1, *command, "run.steps=2")
    (damaged,) = latest(tmp_path / "run" / "checkpoints").glob("*.safetensors")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    ((status, errors),) = train_on(1, *command, "run.steps=4")
    assert status == 2
    assert str(damaged) in errors
    assert len(read_metrics(tmp_path / "run" / METRICS_FILE)) == 2


def test_a_changed_configuration_is_named(tmp_path):
    command = ["--config", "tests/configs/tiny.yaml", f"run.dir={tmp_path / 'run'}"]
    train_on(1, *command, "run.steps=2")
    ((status, errors),) = train_on(1, *command, "run.steps=3", "run.seed=5", "optim.lr=1e-4")
    assert status == 0
    assert "run.seed=0 is now 5" in errors
    assert "optim.lr=0.003 is now 0.0001" in errors


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(tmp_path):
    folder = tmp_path / "run"
    command = ["--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "checkpoint.every=1", "optim.clip=0"]
    train_on(2, *command, "run.steps=2")
    results = train_on(2, *command, "run.steps=8", "optim.lr=1e300")
    assert [status for status, _ in results] == [1, 1]
    assert "lower optim.lr" in results[0][1]
    last = latest(folder / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in load_tensors(last, prefix="weight.").values())
    assert all(line["skipped"] or math.isfinite(line["loss"]) for line in read_metrics(folder / METRICS_FILE))
    assert [line["step"] for line in read_metrics(folder / METRICS_FILE) if line["skipped"]] == [4, 5, 6, 7, 8]
    assert last.name == "step_00000003", "nothing is saved while steps are left out"


@pytest.mark.parametrize("when", ["before", "after a checkpoint"])
def test_a_tokenizer_without_a_checkpoint_is_trained_again(when, tmp_path):
    folder = tmp_path / "run"
    command = ["--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=1"]
    if when == "before":  # what a kill before the first checkpoint leaves
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(b"")
    train_on(1, *command)
    first = (folder / "tokenizer.model").read_bytes()
    train_on(1, *command, "run.steps=2", "text.vocabulary=96")
    assert (folder / "tokenizer.model").read_bytes() == first != b""
