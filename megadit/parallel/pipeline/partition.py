"""Layers to stages, balanced by cost."""

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
