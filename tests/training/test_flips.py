"""A bit that flips in one replica's memory ends the run before it is saved, and the rank is named."""

import json
from dataclasses import replace

import pytest
import torch

from megadit.checkpoint import latest
from megadit.runtime.status import LOST
from megadit.training.events import EVENTS_FILE
from megadit.training.loop import Flipped, resume
from tests.ranks import run_ranks
from tests.training.assembled import assembled, train_alone


class Flipping:
    """A loader before whose last batch a bit of one rank's first parameter flips, after a step's work on it."""

    def __init__(self, run, rank, step):
        self.run, self.concerned, self.step = run, run.process.rank == rank, step
        self.update = run.ema.update

    def batch(self, step):
        return self.run.loader.batch(step)

    def after_update(self, step):
        self.update(step)
        if self.concerned and step == self.step:
            with torch.no_grad():
                self.run.named[0][1].view(-1).view(torch.int32)[5] ^= 1 << 20


def flipped_run(rank, world_size, folder, every, overrides):
    settings = ["run.steps=8", "checkpoint.every=2", "run.dtype=float32", f"guard.checksum_every={every}"]
    run = assembled(rank, world_size, f"run.dir={folder}", *settings, *overrides)
    flipping = Flipping(run, 1, 6)
    run.ema.update = flipping.after_update
    try:
        train_alone(replace(run, loader=flipping), resume(run))
    except Flipped as error:
        return error.status, str(error)
    return 0, ""


@pytest.mark.parametrize("overrides", [["zero.stage=0"], ["zero.stage=1"]], ids=["stage0", "stage1"])
def test_a_flip_is_found_before_it_is_saved(overrides, tmp_path):
    for status, message in run_ranks(flipped_run, 4, tmp_path, 100, overrides):
        assert status == LOST
        assert message.startswith("step 6: ") and "differ on ranks [1]" in message
    assert latest(tmp_path / "checkpoints").name == "step_00000004"
    flip, stop = (json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()[-2:])
    assert (flip["event"], flip["ranks"], len(flip["parameters"])) == ("flip", [1], 1)
    assert (stop["event"], stop["status"]) == ("stop", LOST)


def test_nobody_compares_unless_asked(tmp_path):
    assert run_ranks(flipped_run, 2, tmp_path, 0, ["zero.stage=1"]) == [(0, "")] * 2
