"""Whether the ranks that should hold equal parameters do: what finds memory that has flipped a bit.

A checksum is the sum of a tensor's bits, read as whole numbers: any single flip changes it. It costs one pass over the
parameters' memory, and an all-gather of eight bytes for each parameter over a stage's ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of
from megadit.runtime.agreement import gathered

_AS_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REPLICATING = ("edp", "ep", "tp")  # axes along which a parameter is the same unless it is cut; tp fastest


@dataclass(frozen=True)
class Difference:
    """A parameter whose replicas differ. ranks: those that are not of the majority; all, where there is none."""

    name: str
    ranks: tuple[int, ...]


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the elements' bits as whole numbers, modulo 2^64, 0-dim int64.

    >>> int(checksum(torch.tensor([1.0, -0.0]))) - int(checksum(torch.tensor([1.0, 0.0]))) == -2**31
    True
    """
    whole = tensor.detach().contiguous().view(-1).view(_AS_WHOLE_NUMBERS[tensor.element_size()])
    return whole.sum(dtype=torch.int64)


def differing_replicas(named: Sequence[tuple[str, nn.Parameter]], grid: Grid) -> list[Difference]:
    """Parameters that are not bitwise equal on all ranks that hold the same part of them. Collective, and the same
    answer everywhere.
    """
    sums_P = torch.stack([checksum(parameter) for _, parameter in named])
    of_tensor_ranks = grid["tp"].all_gather(sums_P[None], dim=0)
    sizes = [grid[axis].size for axis in REPLICATING]
    table = grid["dp"].all_gather(of_tensor_ranks[None], dim=0).view(*sizes, len(named)).cpu()  # host sync
    own = []
    for column, (name, parameter) in enumerate(named):
        axes = tuple(axis for axis in REPLICATING if axis not in placement_of(parameter).cut_axes)
        part = tuple(slice(None) if axis in axes else grid[axis].rank for axis in REPLICATING)
        values = table[(*part, column)].flatten().tolist()
        if odd := odd_ones(values, grid.layout.members(axes, grid.rank)):
            own.append(Difference(name, odd))
    merged: dict[str, set[int]] = {}  # each part of a parameter that is cut has replicas of its own
    for difference in (difference for found in gathered(own) for difference in found):
        merged.setdefault(difference.name, set()).update(difference.ranks)
    return [Difference(name, tuple(sorted(ranks))) for name, ranks in sorted(merged.items())]


def odd_ones(values: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks whose value is not the one of most.

    >>> odd_ones([7, 7, 9, 7], [0, 2, 4, 6]), odd_ones([7, 9], [1, 5]), odd_ones([7, 7], [1, 5])
    ((4,), (1, 5), ())
    """
    (most, count), *others = Counter(values).most_common(2)
    if others and others[0][1] == count:
        return tuple(ranks)
    return tuple(rank for rank, value in zip(ranks, values, strict=True) if value != most)
