"""What became of a run, and what its restarts cost."""

import math

import pytest

from megadit.history.outcome import num_starts, restarts, verdict
from megadit.history.story import read_story
from tests.history.made import EVERY_EVENT, curve, event, folder, settings


@pytest.fixture
def story(tmp_path):
    def make(events, steps=30, planned=100, last_loss=None):
        lines = curve(steps)
        if last_loss is not None:
            lines[-1]["loss"] = last_loss
        return read_story(folder(tmp_path / "run", lines, events, settings("mine", planned)))

    return make


START = event(0, "start", 0, "a new run")


@pytest.mark.parametrize(
    ("events", "said", "is_good"),
    [
        ([START, event(9, "finish", 100, status=0)], "Finished: step 100 is done", True),
        (
            [START, event(9, "stop", 30, "asked by SIGTERM", status=75)],
            "Stopped: asked by SIGTERM, at step 30 of",
            True,
        ),
        ([START, event(9, "stop", 30, "loss nan", status=1)], "Diverged: loss nan, at step 30 of 100", False),
        ([START, event(9, "stop", 30, "no room", status=3)], "Finished, but its last checkpoint was not saved", False),
        (
            [START, event(9, "lost", 30, "rank 3 died"), event(9, "stop", 30, "rank 3", status=76)],
            "Lost: rank 3",
            False,
        ),
        ([START, event(9, "lost", 30, "rank 3 died")], "Lost: rank 3 died, at step 30 of 100", False),
        ([START, event(9, "stop", 30, "", status=[9])], "Stopped: at step 30 of 100", False),
        ([START], "Running: at step 30 of 100", True),
        ([START, event(9, "stop", 30, "", status=75), event(20, "resume", 30)], "Running: at step 30 of 100", True),
        (None, "Running: at step 30 of 100", True),
    ],
)
def test_verdict(story, events, said, is_good):
    told = story(events)
    found = verdict(told, told.changed + 60)
    assert str(found).startswith(said)
    assert found.is_good == is_good


def test_a_run_that_is_silent_was_killed_or_hangs(story):
    told = story([START])
    assert str(verdict(told, told.changed + 7300)).startswith("No end was told: nothing was written for 2 h 1 min")


def test_a_run_of_long_steps_may_be_silent_for_longer(story):
    told = story([START])
    told.curves["seconds"].values[:] = 300.0  # and the device is looked at every ten steps
    assert verdict(told, told.changed + 7300).word == "Running"


def test_an_older_run_is_finished_by_its_steps_and_diverges_by_its_loss(story, tmp_path):
    assert verdict(story(None, steps=30, planned=30), math.inf).word == "Finished"
    lines = curve(9)
    lines[-1]["loss"] = math.inf
    told = read_story(folder(tmp_path / "other", lines, None, settings("other", 30)))
    assert str(verdict(told, math.inf)) == "Diverges: the last loss is inf, at step 9 of 30"


def test_what_restarts_cost(story):
    told = story(EVERY_EVENT)
    # The first from step 40, to which the run had gone back at 35 s; the second from the save at 192 s.
    assert [(restart.step, restart.lost) for restart in restarts(told.events)] == [(40, 163 - 35), (82, 293 - 192)]
    assert num_starts(told) == 3


@pytest.mark.parametrize(
    ("events", "lost"),
    [
        ([START], []),
        ([START, event(50, "start", 0)], [50]),
        ([START, event(10, "save", 20), event(30, "save", 40), event(70, "resume", 20)], [60]),
        # A save in the background is told of some steps later.
        ([START, event(12, "save", 22), event(70, "resume", 20)], [58]),
        # No word of the step: after the last word.
        ([START, event(12, "skip", 3), event(70, "resume", 20)], [58]),
        # Killed before any step: all of its time.
        ([START, event(10, "save", 20), event(20, "resume", 20), event(70, "resume", 20)], [10, 50]),
        # Clocks that go back, and lines without a time.
        ([START, event(10, "save", 20), event(5, "resume", 20)], [0]),
        ([START, {"event": "resume", "step": 0}, event(9, "resume", 0)], [0, 0]),
    ],
)
def test_restarts(story, events, lost):
    assert [restart.lost for restart in restarts(story(events).events)] == pytest.approx(lost)


def test_a_run_without_events_started_once(story):
    assert num_starts(story(None)) == 1
