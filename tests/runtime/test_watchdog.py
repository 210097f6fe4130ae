"""A rank is lost: the others end soon, with one status, and name it and what they waited for."""

import signal
import time

import pytest

from megadit.runtime.status import LOST
from tests.lost_ranks import train_and_lose

SOON = 10  # seconds, beyond the configured ones
QUICK = ["watchdog.hang=4", "watchdog.silent=3"]


def at_batch(rank, culprit, folder, what):
    """Have the culprit do `what` instead of reading the batch of step 4."""
    from megadit.data.loader import Loader

    read = Loader.batch

    def batch(self, step):
        if rank == culprit and step == 4:
            (folder.parent / "fault").touch()
            what()
        return read(self, step)

    Loader.batch = batch


def loop_for_ever():
    while True:
        time.sleep(0.01)


def fail():
    raise ArithmeticError("the planted fault")


def looping(rank, folder):
    at_batch(rank, 1, folder, loop_for_ever)


def raising(rank, folder):
    at_batch(rank, 1, folder, fail)


def raising_first(rank, folder):
    at_batch(rank, 0, folder, fail)


def survivors(outcome, lost):
    return [rank for rank in range(len(outcome.statuses)) if rank != lost]


def judge(outcome, lost, seconds, collective="all_reduce of"):
    """All others ended in time, with the status of a loss, and said whom they lost and what they waited for."""
    assert outcome.seconds < seconds, outcome.errors
    for rank in survivors(outcome, lost):
        assert outcome.statuses[rank] == LOST, outcome.errors
        assert f"rank {lost} (" in outcome.errors[rank] and str(outcome.pids[lost]) in outcome.errors[rank]
        assert f"rank_{rank}.txt" in outcome.dumps()
    event = outcome.lost()
    assert event["ranks"] == [lost] and collective in event["collective"], event
    assert f"rank {lost} (" in event["reason"]
    assert any(collective in outcome.errors[rank] for rank in survivors(outcome, lost))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(victim, tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", *QUICK, send=(victim, signal.SIGSTOP), gone=[victim])
    judge(outcome, victim, 4 + SOON)
    assert outcome.statuses[victim] is None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_and_the_others_end(victim, tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", send=(victim, signal.SIGKILL))
    judge(outcome, victim, SOON)


@pytest.mark.parametrize(("plant", "culprit"), [(raising, 1), (raising_first, 0)])
def test_a_rank_that_raises_says_so_and_the_others_name_it(plant, culprit, tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", plant=plant)
    judge(outcome, culprit, SOON)
    assert outcome.statuses == [LOST, LOST]
    assert "the planted fault" in outcome.errors[1 - culprit]
    assert outcome.errors[culprit].lstrip().startswith("Traceback") or "Traceback" in outcome.errors[culprit]


def test_a_hung_rank_is_named_and_every_rank_says_where_it_is(tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", *QUICK, plant=looping)
    judge(outcome, 1, 4 + SOON)
    assert outcome.statuses == [LOST, LOST]
    assert "loop_for_ever" in outcome.dumps()["rank_1.txt"]
    assert "has not joined" in outcome.lost()["reason"]
