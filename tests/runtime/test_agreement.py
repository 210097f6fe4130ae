"""Ranks that agree: one that fails leaves none of them waiting."""

import pytest

from megadit.runtime.agreement import of_main, together
from tests.ranks import run_ranks


def find(rank, world_size, fault):
    """Each rank would find something else."""

    def look():
        if fault and rank == 0:
            raise ValueError("nothing there")
        return {"path": rank}

    try:
        return of_main(look)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("fault", "expected"), [(False, {"path": 0}), (True, "nothing there")])
def test_every_rank_has_what_the_first_one_found(fault, expected):
    assert run_ranks(find, 3, fault, limit=120) == [expected] * 3


def block(rank, world_size, failing):
    try:
        with together():
            if rank in failing:
                raise ValueError(f"rank {rank} failed")
    except ValueError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize(
    ("failing", "expected"),
    [((), "went on"), ((1,), "rank 1 failed"), ((2, 1), "rank 1 failed"), ((0,), "rank 0 failed")],
)
def test_all_ranks_leave_a_block_in_the_same_way(failing, expected):
    assert run_ranks(block, 3, failing, limit=120) == [expected] * 3


def crash(rank, world_size):
    with together():
        if rank == 1:
            raise KeyError("a bug")


def test_what_is_no_fault_of_the_user_is_not_turned_into_one():
    with pytest.raises(KeyError, match="a bug"):
        run_ranks(crash, 2, limit=120)
