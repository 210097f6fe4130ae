"""The ranks as one tensor, and every process group as a slice of it.

    ranks[pp, edp, ep, tp], tp fastest;  dp = edp x ep

Expert parallelism subdivides data parallelism, so it adds no axis to the world. The grid is an object that is passed
down; leaf layers receive the one `Group` that they use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megadit.parallel.layout import AXES, Layout

# torch 2.13 renamed both; the older names still work there, with a warning.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Named unions of axes that have a process group of their own.
UNIONS = {"dp": ("edp", "ep"), "world": AXES}


@dataclass(frozen=True)
class Group:
    """A process group as a layer sees it: its size, this process's rank in it, and the collectives.

    Every method returns a new contiguous tensor and leaves its argument alone; over a group of one it returns the
    argument itself, at no cost.
    """

    handle: dist.ProcessGroup
    size: int
    rank: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.handle)
        return out

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The group's tensors side by side along `dim`, in rank order."""
        if self.size == 1:
            return x
        out = x.new_empty(self.size, *x.shape)
        _all_gather(out.view(self.size * x.shape[0], *x.shape[1:]), x.contiguous(), group=self.handle)
        return torch.cat(out.unbind(0), dim=dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of the sum over the group."""
        if self.size == 1:
            return x
        parts = x.chunk(self.size, dim=dim)
        out = x.new_empty(parts[0].shape)
        # As a concatenation along dimension 0: gloo takes no other form.
        _reduce_scatter(out.view(-1), torch.cat([part.flatten() for part in parts]), group=self.handle)
        return out

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a replicated tensor along `dim`: no communication."""
        if self.size == 1:
            return x
        return x.chunk(self.size, dim=dim)[self.rank].clone(memory_format=torch.contiguous_format)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Equal-split exchange along dimension 0: part i goes to rank i, and comes from it."""
        if self.size == 1:
            return x
        x = x.contiguous()
        # gloo silently writes wrong data into a non-contiguous output, so make it from the shape, not from the strides.
        out = x.new_empty(x.shape)
        dist.all_to_all_single(out, x, group=self.handle)
        return out

    def all_to_all_ragged(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Exchange along dimension 0 of `sent[i]` rows to rank i for `received[i]` rows from it."""
        if self.size == 1:
            return x
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.handle)
        return out


class Grid:
    """This process's place in the layout, with a `Group` for each axis and each union of axes."""

    def __init__(self, layout: Layout, rank: int) -> None:
        """Collective: every process creates its groups, each waiting only for the members of that group."""
        self.layout = layout
        self.rank = rank
        self._groups = {axis: self._create(axis, (axis,)) for axis in AXES}
        self._groups |= {name: self._create(name, axes) for name, axes in UNIONS.items()}

    def _create(self, name: str, axes: tuple[str, ...]) -> Group:
        members = self.layout.members(axes, self.rank)
        # Local synchronisation: at 1,024 ranks nobody waits for groups that it is not in.
        handle = dist.new_group(members, use_local_synchronization=True, group_desc=name)
        return Group(handle, len(members), members.index(self.rank))

    def __getitem__(self, name: str) -> Group:
        """The group of an axis ("pp", "edp", "ep", "tp") or a union ("dp", "world")."""
        return self._groups[name]

    def coordinate(self, axes: tuple[str, ...]) -> int:
        """This rank's index along several axes read as one number, the last axis fastest."""
        index = 0
        for axis in axes:
            index = index * self[axis].size + self[axis].rank
        return index

    def size(self, axes: tuple[str, ...]) -> int:
        """The number of ranks along several axes."""
        size = 1
        for axis in axes:
            size *= self[axis].size
        return size
