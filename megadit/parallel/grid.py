"""The ranks as one tensor, and every process group as a slice of it.

    ranks[pp, edp, ep, tp], tp fastest;  dp = edp x ep

Expert parallelism subdivides data parallelism, so it adds no axis to the world. The grid is an object that is passed
down; leaf layers receive the one `Group` that they use.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; the older names still work there, with a warning.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

AXES = ("pp", "edp", "ep", "tp")
# Named unions of axes that have a process group of their own.
UNIONS = {"dp": ("edp", "ep"), "world": AXES}


@dataclass(frozen=True)
class Fallback:
    """What is otherwise in a layout for another number of processes; None: as in `parallel`."""

    tensor: int | None = None
    pipeline: int | None = None
    expert: int | None = None
    sequence: bool | None = None
    schedule: Literal["1f1b", "interleaved", "zbv"] | None = None
    stages_per_rank: int | None = None


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel degree is what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    sequence: bool = False  # cut the tokens between blocks over the tensor axis
    schedule: Literal["1f1b", "interleaved", "zbv"] = "1f1b"
    stages_per_rank: int = 2  # interleaved: slices of the layers that a pipeline rank holds (zbv: always 2)
    fallbacks: tuple[Fallback, ...] = ()  # layouts for other numbers of processes, the first that fits is taken

    def layouts(self) -> list[ParallelConfig]:
        """The fallbacks, each with what it does not say as it is here."""
        return [
            replace(self, **{key: value for key, value in asdict(other).items() if value is not None})
            for other in self.fallbacks
        ]

    @property
    def stages_on_rank(self) -> int:
        """Pipeline stages that one rank holds under the schedule."""
        return {"1f1b": 1, "interleaved": self.stages_per_rank, "zbv": 2}[self.schedule]


@dataclass(frozen=True)
class Layout:
    """How many ranks lie along each axis. Pure: it needs no process group."""

    pp: int
    edp: int
    ep: int
    tp: int

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Layout:
        """The layout of `config` on `world_size` processes.

        Raises ValueError when the degrees do not divide the world.
        """
        fixed = config.tensor * config.pipeline * config.expert
        if world_size % fixed:
            raise ValueError(
                f"parallel.tensor={config.tensor} x pipeline={config.pipeline} x expert={config.expert} = {fixed} "
                f"does not divide the {world_size} processes that were started; "
                f"start a multiple of {fixed}, or lower the degrees"
            )
        return cls(pp=config.pipeline, edp=world_size // fixed, ep=config.expert, tp=config.tensor)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def dp(self) -> int:
        """The data-parallel degree, edp x ep."""
        return self.edp * self.ep

    @property
    def ranks(self) -> Tensor:
        """All ranks, [pp, edp, ep, tp]."""
        return torch.arange(self.pp * self.edp * self.ep * self.tp).view(self.sizes)

    def members(self, axes: tuple[str, ...], rank: int) -> list[int]:
        """The ranks that differ from `rank` along `axes` only, in the order of the tensor of ranks.

        >>> Layout(pp=1, edp=2, ep=2, tp=2).members(("ep",), rank=5)
        [5, 7]
        >>> Layout(pp=1, edp=2, ep=2, tp=2).members(("edp", "ep"), rank=5)
        [1, 3, 5, 7]
        """
        here = torch.unravel_index(torch.tensor(rank), self.sizes)
        index = tuple(slice(None) if axis in axes else int(here[i]) for i, axis in enumerate(AXES))
        return self.ranks[index].flatten().tolist()


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
