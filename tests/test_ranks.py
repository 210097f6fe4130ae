"""The pool of ranks: results by rank, errors that say where every rank was, and nothing kept between calls."""

import os
import random
import threading
import time

import numpy
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

SEEN = []


def total(rank, world_size, factor):
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    return rank, world_size, factor * float(x), os.getpid()


def test_results_come_by_rank_and_the_same_processes_serve_every_call():
    first = run_ranks(total, 4, 10)
    assert [result[:3] for result in first] == [(rank, 4, 60.0) for rank in range(4)]
    pids = [result[3] for result in first]
    assert len({os.getpid(), *pids}) == 5
    for world_size in (2, 1, 3, 4):
        assert [result[3] for result in run_ranks(total, world_size, 1)] == pids[:world_size]
    assert [result[3] for result in run_ranks(total, 8, 1)][:4] == pids


def count_resources(rank, world_size):
    dist.all_reduce(torch.ones(1), group=dist.new_group(list(range(world_size))))
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts the open files that Linux lists")
def test_many_calls_leak_no_file_descriptors():
    run_ranks(count_resources, 4)
    before, here = run_ranks(count_resources, 4), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        after = run_ranks(count_resources, 4)
    assert after == before
    assert len(os.listdir("/proc/self/fd")) == here


def find(rank, world_size):
    """What this call sees of everything that another could have changed."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    return {
        "module": list(SEEN),
        "environment": os.environ.get("LEFT_BEHIND"),
        "folder": os.getcwd(),
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "random": (float(torch.rand(())), float(numpy.random.rand()), random.random()),
        "deepspeed": (comm.cdb, groups._EXPERT_PARALLEL_GROUP, groups._ALL_TO_ALL_GROUP, groups.mpu),
        "world": dist.get_world_size(),
    }


def change(rank, world_size, folder):
    """Change it all, and see that it is changed."""
    import deepspeed
    from deepspeed.utils import groups

    before = find(rank, world_size)
    SEEN.append(rank)
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it would take half a minute
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    groups._EXPERT_PARALLEL_GROUP = {"ep_size_2": dist.group.WORLD}
    groups._ALL_TO_ALL_GROUP["local_0"] = dist.group.WORLD
    groups.mpu = object()
    after = find(rank, world_size)
    return sorted(key for key in before if before[key] != after[key])


def test_a_call_does_not_see_what_another_left(tmp_path):
    before = run_ranks(find, 2)
    everything = sorted(set(before[0]) - {"world"})
    assert run_ranks(change, 2, str(tmp_path)) == [everything] * 2
    assert run_ranks(find, 2) == before
    assert run_ranks(find, 1) == [before[0] | {"world": 1}]


def test_ranks_work_in_the_folder_of_the_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [found["folder"] for found in run_ranks(find, 2)] == [str(tmp_path)] * 2


class Unpicklable(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{reason} {code}")


def wait_for_nobody():
    dist.all_reduce(torch.ones(1))


def fail(rank, world_size, error, *args):
    if rank == 0:
        raise error(*args)
    wait_for_nobody()


@pytest.mark.parametrize(
    ("error", "raised"), [((ValueError, "wrong 5"), ValueError), ((Unpicklable, 5, "wrong"), RuntimeError)]
)
def test_an_error_of_one_rank_is_raised_with_the_stacks_of_all(error, raised):
    with pytest.raises(raised, match="wrong 5") as caught:
        run_ranks(fail, 3, *error)
    first, *others = caught.value.__notes__
    assert first.startswith("rank 0 raised:") and "in fail" in first and "wrong 5" in first
    assert len(others) == 2
    for rank, note in enumerate(others, start=1):
        assert note.startswith(f"rank {rank} was here:") and "in wait_for_nobody" in note and "in all_reduce" in note
    assert [result[2] for result in run_ranks(total, 3, 1)] == [3.0] * 3


def hang(rank, world_size):
    if rank == 0:
        wait_for_nobody()
    else:
        stay_away()


def stay_away():
    time.sleep(600)


def test_a_hang_is_cut_at_its_limit_with_the_stacks_of_all():
    pids, start = [result[3] for result in run_ranks(total, 2, 1)], time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not finish in 5 s") as caught:
        run_ranks(hang, 2, limit=5)
    assert 5 <= time.monotonic() - start < 15
    waiting, away = caught.value.__notes__
    assert waiting.startswith("rank 0 was here:") and "in wait_for_nobody" in waiting and "in all_reduce" in waiting
    assert away.startswith("rank 1 was here:") and "in stay_away" in away
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [result[2] for result in run_ranks(total, 2, 1)] == [1.0] * 2


def end(rank, world_size):
    if rank == 1:
        os._exit(3)
    wait_for_nobody()


def test_a_rank_that_ends_is_named():
    with pytest.raises((ChildProcessError, RuntimeError)) as caught:
        run_ranks(end, 2)
    assert "rank 1 ended" in "".join(caught.value.__notes__)


def return_a_lambda(rank, world_size):
    return lambda: rank


def test_what_cannot_be_sent_is_an_error():
    with pytest.raises(Exception, match="pickle"):
        run_ranks(return_a_lambda, 2)
    with pytest.raises(Exception, match="pickle"):
        run_ranks(lambda rank, world_size: rank, 2)
    assert [result[2] for result in run_ranks(total, 2, 1)] == [1.0] * 2
