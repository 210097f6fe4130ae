"""Layers to stages, balanced by cost, and stages to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate


def partition(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cut the layers into contiguous stages so that the dearest stage is as cheap as can be.

    `costs` has one number per layer, in order (forward FLOPs, say); no stage is empty. Exact, by dynamic programming
    over (first layer, stages left). Raises ValueError when there are fewer layers than stages.

    >>> partition([1, 1, 1, 1], 2)
    [range(0, 2), range(2, 4)]
    >>> partition([1, 3, 1, 3, 1, 3], 2)
    [range(0, 3), range(3, 6)]
    """
    num_layers = len(costs)
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages; lower parallel.pipeline")
    before = [0.0, *accumulate(costs)]

    @cache
    def best(first: int, stages: int) -> tuple[float, int]:
        """(cost of the dearest stage, end of the first stage) for layers from `first` on."""
        if stages == 1:
            return before[num_layers] - before[first], num_layers
        return min(
            (max(before[end] - before[first], best(end, stages - 1)[0]), end)
            for end in range(first + 1, num_layers - stages + 2)
        )

    stages, first = [], 0
    for left in range(num_stages, 0, -1):
        end = best(first, left)[1]
        stages.append(range(first, end))
        first = end
    return stages


def stage_indices(schedule: str, rank: int, num_ranks: int, stages_per_rank: int) -> list[int]:
    """The stages that a pipeline rank holds, ascending.

    "interleaved" deals them out in turn (arXiv 2104.04473), "zbv" down and up again, as a V (arXiv 2401.10241).

    >>> [stage_indices("interleaved", rank, 2, 2) for rank in range(2)]
    [[0, 2], [1, 3]]
    >>> [stage_indices("zbv", rank, 2, 2) for rank in range(2)]
    [[0, 3], [1, 2]]
    """
    if schedule == "zbv":
        assert stages_per_rank == 2, "a V has two stages per rank"
        return [rank, 2 * num_ranks - 1 - rank]
    return [rank + turn * num_ranks for turn in range(stages_per_rank)]
