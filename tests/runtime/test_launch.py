"""Where a process stands, from every launcher's environment variables."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megadit.runtime.launch import (
    LaunchError,
    call_roll,
    discover,
    first_host,
    process_group,
    rendezvous,
    run_in_turns,
)

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}
STEP = {"SLURM_STEP_ID": "0"}
BATCH = {"ENVIRONMENT": "BATCH"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 8, 1)),
        (SLURM, (3, 4, 2)),
        (SLURM | STEP, (3, 4, 2)),
        (SLURM | STEP | BATCH, (3, 4, 2)),  # srun in the script of an sbatch job
        (SLURM | BATCH, (0, 1, 0)),  # the script itself
        ({"SLURM_NTASKS": "4"} | BATCH, (0, 1, 0)),
        ({"SLURM_NTASKS": "4"}, (0, 1, 0)),  # the shell of salloc
        (TORCHRUN | SLURM | STEP, (5, 8, 1)),  # torchrun started by srun, one per node
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),  # no local rank: the first on its node
        ({"LOCAL_RANK": "1"}, (0, 1, 0)),
    ],
)
def test_place_among_the_processes(environ, place):
    assert discover(environ) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "sets RANK but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "sets WORLD_SIZE but not RANK"),
        ({"SLURM_PROCID": "0"} | STEP, "sets SLURM_PROCID but not SLURM_NTASKS"),
        ({"RANK": "0"} | SLURM | STEP, "sets RANK but not WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"} | STEP, "SLURM_PROCID=4 is not below SLURM_NTASKS=4"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        discover(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node3", "node3"),
        ("node3,node4", "node3"),
        ("gpu[007-012]", "gpu007"),
        ("gpu[7]", "gpu7"),
        ("gpu[3,5-9],login1", "gpu3"),
        ("a-1,b-[2-3]", "a-1"),
        ("a-b-[02-10]", "a-b-02"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_an_empty_node_list_is_refused():
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        first_host("")


@pytest.mark.parametrize(
    ("environ", "meeting"),
    [
        ({"MASTER_ADDR": "node-0", "MASTER_PORT": "1234"}, ("node-0", 1234)),
        ({"MASTER_ADDR": "node-0", "SLURM_JOB_ID": "7"}, ("node-0", 20007)),
        ({"SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "7"}, ("gpu07", 20007)),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "4135456"}, ("n1", 35456)),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7", "MASTER_PORT": "1"}, ("n1", 1)),
        ({"SLURM_JOB_NODELIST": "n1", "MASTER_ADDR": "n2", "MASTER_PORT": "1"}, ("n2", 1)),
    ],
)
def test_rank_zero_is_found(environ, meeting):
    assert rendezvous(environ) == meeting


def test_several_processes_without_an_address_are_refused():
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        rendezvous({"MASTER_PORT": "1234"})


def test_a_port_that_is_no_number_is_refused():
    with pytest.raises(LaunchError, match="MASTER_PORT='any' is not a number"):
        rendezvous({"MASTER_ADDR": "node-0", "MASTER_PORT": "any"})


@pytest.mark.parametrize("environ", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_one_process_has_a_group_too_and_leaves_it_after_an_error(environ, monkeypatch):
    for key in os.environ:
        if key in TORCHRUN or key.startswith(("SLURM", "MASTER", "TORCHELASTIC")):
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
