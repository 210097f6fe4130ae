"""A step with a number that is not finite changes nothing, on any rank; who brought it is named."""

import json
from dataclasses import replace

import pytest
import torch

from megadit.training.events import EVENTS_FILE
from megadit.training.loop import Diverged, resume
from megadit.training.metrics import METRICS_FILE, read_metrics
from megadit.training.progress import Progress
from megadit.training.state import logical_state
from megadit.training.step import train_step
from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.training.assembled import assembled, train_alone

ENGINES = {
    "oracle": ["zero.stage=0", "run.dtype=float64"],
    "zero1": ["zero.stage=1", "run.dtype=float32"],
    "zero1_bfloat16": ["zero.stage=1", "run.dtype=bfloat16"],
    "zero2": ["zero.stage=2", "run.dtype=float32"],
    "zero2_bfloat16": ["zero.stage=2", "run.dtype=bfloat16"],
}


class Spoilt:
    """A loader whose rank brings gradients that are not finite in some steps, all in one element of one parameter."""

    def __init__(self, run, rank, steps, value=torch.nan):
        self.loader, self.steps, self.value, self.spoils = run.loader, steps, value, False
        if run.process.rank == rank:
            run.named[-1][1].register_hook(self.spoil)

    def batch(self, step):
        self.spoils = step in self.steps
        return self.loader.batch(step)

    def spoil(self, gradient):
        if not self.spoils:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = self.value
        return gradient


def snapshot(run):
    """The bytes of all state that this rank holds."""
    state = logical_state(run.named, run.ema, run.engine, run.grid, owned_only=False)
    return {
        (name, piece.offsets): piece.tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in state.items()
        for piece in tensor.pieces
    }


def spoilt_step(rank, world_size, overrides, spoiler, value):
    """Three steps, of which one rank spoils the second: what it changed, who is named, and the steps around it."""
    run = assembled(rank, world_size, *overrides)
    run = replace(run, loader=Spoilt(run, spoiler, [2], value))
    first = train_step(run, Progress())
    before = snapshot(run)
    second = train_step(run, first.progress)
    changed = [key for key, content in snapshot(run).items() if content != before[key]]
    third = train_step(run, second.progress)
    moved = [key for key, content in snapshot(run).items() if content != before[key]]
    assert moved, "the step after it changes the state again"
    assert not first.unread.skipped and second.unread.skipped and not third.unread.skipped
    assert third.progress == Progress(step=3, updates=2, skipped=(2,))
    return changed, second.spoilers, second.sample_ids


LAYOUTS = {
    "data2": (2, []),
    "tensor2_expert2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "pipeline2_data2": (4, ["parallel.pipeline=2"]),
}
CASES = [("data2", engine) for engine in ENGINES] + [(layout, "zero1") for layout in LAYOUTS if layout != "data2"]


@pytest.mark.parametrize(("layout", "engine"), slow_but(CASES[:2] + CASES[-1:], CASES, unpack=True))
def test_a_spoilt_step_changes_no_bit_and_names_its_rank_and_samples(layout, engine):
    world_size, overrides = LAYOUTS[layout]
    spoiler = world_size - 1
    results = run_ranks(spoilt_step, world_size, [*ENGINES[engine], *overrides], spoiler, torch.nan)
    for changed, spoilers, _ in results:
        assert changed == []
        assert [found.rank for found in spoilers] == [spoiler]
        assert spoilers[0].sample_ids == results[spoiler][2] != []


@pytest.mark.parametrize("engine", ["oracle", "zero1"])
def test_infinity_spoils_a_step_too(engine):
    for changed, spoilers, _ in run_ranks(spoilt_step, 2, ENGINES[engine], 0, torch.inf):
        assert changed == [] and [found.rank for found in spoilers] == [0]


def spoilt_run(rank, world_size, folder, lives, spoilt, overrides):
    """A run of several lives, of which rank 1 spoils some steps; how it ends."""
    for steps in lives:
        run = assembled(rank, world_size, f"run.dir={folder}", f"run.steps={steps}", "checkpoint.every=2", *overrides)
        start = resume(run)
        try:
            train_alone(replace(run, loader=Spoilt(run, 1, spoilt)), start)
        except Diverged as error:
            return str(error)
    return "finished"


def told(folder, kind):
    lines = [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.mark.parametrize("engine", slow_but(["zero1"], ["oracle", "zero1"]))
def test_a_run_with_a_spoilt_step_goes_on_bit_for_bit(engine, tmp_path):
    """Adam's count of updates is not the number of steps: the checkpoint knows both."""
    for name, lives in {"straight": [6], "restarted": [4, 6]}.items():
        folder = tmp_path / name
        assert set(run_ranks(spoilt_run, 2, folder, lives, [3], ENGINES[engine])) == {"finished"}
        (skip,) = told(folder, "skip")
        assert skip["step"] == 3
        assert skip["ranks"] == [{"rank": 1, "sample_ids": list(range(2 * 16 + 8, 3 * 16))}]
    straight, restarted = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("straight", "restarted"))
    for key in ("step", "loss", "grad_norm", "skipped"):
        assert [line[key] for line in straight] == [line[key] for line in restarted]
    assert [line["skipped"] for line in straight] == [False, False, True, False, False, False]
    assert straight[2]["grad_norm"] is None and straight[2]["loss"] > 0


def test_too_many_spoilt_steps_stop_a_run_which_keeps_its_checkpoints(tmp_path):
    endings = run_ranks(spoilt_run, 2, tmp_path, [20], range(5, 21), ["guard.max_skips=3", *ENGINES["oracle"]])
    (ending,) = set(endings)
    assert ending.startswith("step 8: ") and "rank 1" in ending
    assert "4 of the last 100 steps are left out (guard.max_skips=3)" in ending
    assert [line["step"] for line in told(tmp_path, "skip")] == [5, 6, 7, 8]
    assert told(tmp_path, "stop")[0]["status"] == 1
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000004"], "nothing is saved while steps are spoilt"


def test_old_skips_are_forgotten(tmp_path):
    endings = run_ranks(spoilt_run, 2, tmp_path, [14], [1, 2, 7, 8, 13], ["guard.max_skips=2", "guard.window=5"])
    assert set(endings) == {"finished"}
