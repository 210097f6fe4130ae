"""The process group: of one process, and of several that meet."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megadit.runtime.environment import LaunchError
from megadit.runtime.launch import call_roll, process_group, run_in_turns

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM", "MASTER", "TORCHELASTIC")  # their variables begin so


@pytest.mark.parametrize("environ", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_one_process_has_a_group_too_and_leaves_it_after_an_error(environ, monkeypatch):
    for key in os.environ:
        if key.startswith(LAUNCHERS):
            monkeypatch.delenv(key)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(KeyError), process_group() as process:
        assert (process.rank, process.world_size, process.local_rank, process.is_main) == (0, 1, 0, True)
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        raise KeyError
    assert not dist.is_initialized()


@pytest.mark.skipif(sys.platform != "linux", reason="schedules as Linux does")
def test_ranks_take_turns_in_the_threads_that_they_start_too():
    def policies():
        run_in_turns()
        with ThreadPoolExecutor(1) as later:
            return os.sched_getscheduler(0), later.submit(os.sched_getscheduler, 0).result()

    with ThreadPoolExecutor(1) as thread:  # policies are a thread's, and its children's: this one keeps its own
        assert thread.submit(policies).result() == (os.SCHED_BATCH, os.SCHED_BATCH)


def roll(ranks, world_size, seconds):
    """What becomes of each of these ranks when the roll is called: None, or the error."""
    store = dist.HashStore()
    with ThreadPoolExecutor(len(ranks)) as threads:
        calls = [threads.submit(call_roll, store, rank, world_size, timedelta(seconds=seconds)) for rank in ranks]
        return [call.exception() for call in calls]


def test_the_roll_ends_when_all_have_come():
    assert roll([2, 0, 1], 3, 60) == [None] * 3


def test_processes_that_do_not_come_are_named_on_all_that_have():
    for error in roll([0, 3], 5, 0.3):
        assert isinstance(error, LaunchError)
        assert str(error) == "of 5 processes these did not come in 0 s: 1,2,4"
