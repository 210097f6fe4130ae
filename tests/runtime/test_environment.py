"""Where a process stands, from every launcher's environment variables."""

import pytest

from megadit.runtime.environment import LaunchError, discover, first_host, rendezvous

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
