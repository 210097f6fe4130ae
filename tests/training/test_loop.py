"""What a run leaves in its folder, and that looking at it on the way changes nothing."""

import math

import pytest
from PIL import Image

from megadit.checkpoint import read_manifest
from megadit.model.count import forward_flops
from megadit.training.config import load_config
from megadit.training.loop import resume
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import run_ranks, train_on
from tests.tiers import slow_but
from tests.training.assembled import CONFIG, assembled

STEPS = 5
WATCHED = ["log.evaluate_every=2", "log.sample_every=2", "log.tensorboard=true", "checkpoint.every=2"]


def train(folder, world_size, *overrides):
    command = ["--config", CONFIG, f"run.dir={folder}", f"run.steps={STEPS}", *overrides]
    results = train_on(world_size, *command)
    assert [status for status, _ in results] == [0] * world_size
    return read_metrics(folder / METRICS_FILE)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop") / "run"
    return folder, train(folder, 2, "checkpoint.keep=2", *WATCHED)


def test_a_run_writes_these_files_and_no_others(watched):
    folder, _ = watched
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "events.jsonl", "lock", "metrics.jsonl", "tokenizer.model"),
        *("checkpoints", "samples", "tensorboard"),
    }
    assert {path.name for path in (folder / "samples").iterdir()} == {
        *("step_00000002.png", "step_00000004.png", "step_00000005.png"),
    }
    (events,) = (folder / "tensorboard").iterdir()
    assert events.stat().st_size > 0


def test_the_newest_checkpoints_stay(watched):
    folder, _ = watched
    assert {path.name for path in (folder / "checkpoints").glob("step_*")} == {"step_00000004", "step_00000005"}


@pytest.mark.parametrize(("keep", "steps"), [(0, [2, 4, 5]), (1, [5])])
def test_keep_counts_checkpoints_and_zero_keeps_all(keep, steps, tmp_path):
    train(tmp_path / "run", 1, f"checkpoint.keep={keep}", "checkpoint.every=2")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == [f"step_{step:08d}" for step in steps]


def test_the_configuration_is_saved_with_the_run_and_with_each_checkpoint(watched):
    folder, _ = watched
    config = load_config(folder / "config.yaml")
    overrides = [f"run.dir={folder}", f"run.steps={STEPS}", "checkpoint.keep=2", *WATCHED]
    assert config == load_config(CONFIG, overrides)
    assert read_manifest(folder / "checkpoints" / "step_00000005")["metadata"]["config"] == config.to_dict()


def test_every_step_has_a_line_with_every_key(watched):
    _, lines = watched
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    keys = {"step", "loss", "grad_norm", "lr", "seconds", "images_per_second", "tflops_per_gpu", "peak_memory_gb"}
    for line in lines:
        evaluated = {"heldout_loss"} if line["step"] in (2, 4, 5) else set()
        assert line.keys() == keys | {"routing", "skipped"} | evaluated
        assert all(math.isfinite(line[key]) and line[key] > 0 for key in keys | evaluated)
        assert line["routing"].keys() == {"1", "3"}
        assert all(stats.keys() == {"picks", "unpicked", "busiest", "entropy"} for stats in line["routing"].values())


def test_rates_follow_from_the_seconds(watched):
    folder, lines = watched
    config = load_config(folder / "config.yaml")
    for line in lines:
        assert line["images_per_second"] == pytest.approx(16 / line["seconds"])
        # Backward costs twice the forward; two processes share the 16 images.
        work = 3 * forward_flops(config.model, config.text) * 16 / 2
        assert line["tflops_per_gpu"] == pytest.approx(work / line["seconds"] / 1e12)


def test_pictures_are_grids_of_the_right_size(watched):
    folder, _ = watched
    with Image.open(folder / "samples" / "step_00000004.png") as picture:
        assert (picture.mode, picture.size) == ("L", (6 * (10 * 9 + 1), 6 * (9 + 1)))


def test_looking_every_third_step_leaves_the_same_line_for_each(tmp_path):
    each, third = (train(tmp_path / every, 1, f"log.every={every}", "checkpoint.every=100") for every in ("1", "3"))
    assert [line["step"] for line in third] == [1, 2, 3, 4, 5]
    for one, other in zip(each, third, strict=True):
        assert all(one[key] == other[key] for key in ("loss", "grad_norm", "lr", "routing"))
    seconds = [line["seconds"] for line in third]
    assert len(set(seconds[:3])) == len(set(seconds[3:])) == 1, "the mean of the steps between two looks"


ZERO1 = ["run.dtype=float32", "zero.stage=1"]


@pytest.mark.parametrize("overrides", slow_but([[]], [[], ZERO1]), ids=["stage0", "stage1"])
def test_evaluating_drawing_and_saving_change_no_loss(overrides, tmp_path):
    quiet = train(tmp_path / "quiet", 1, *overrides)
    busy = train(tmp_path / "busy", 1, *overrides, *WATCHED)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in busy] == [line[key] for line in quiet]


def resumed(rank, world_size, folder):
    """The step that a run of another layout resumes from, and its largest weight difference to its start."""
    run = assembled(rank, world_size, f"run.dir={folder}", f"run.steps={STEPS}", "parallel.pipeline=2")
    before = [parameter.detach().clone() for _, parameter in run.named]
    step = resume(run).step
    change = max((p - b).abs().max() for (_, p), b in zip(run.named, before, strict=True))
    return step, float(change)


def test_resume_loads_the_newest_checkpoint_in_another_layout(watched):
    for step, change in run_ranks(resumed, 2, watched[0]):
        assert step == STEPS
        assert change > 0


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path):
    assert run_ranks(resumed, 2, tmp_path / "nothing") == [(0, 0.0)] * 2
