"""Degrees of parallelism, and the layout that they give the ranks: configuration, readable before torch is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

AXES = ("pp", "edp", "ep", "tp")


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
        import torch

        return torch.arange(self.pp * self.edp * self.ep * self.tp).view(self.sizes)

    def members(self, axes: tuple[str, ...], rank: int) -> list[int]:
        """The ranks that differ from `rank` along `axes` only, in the order of the tensor of ranks.

        >>> Layout(pp=1, edp=2, ep=2, tp=2).members(("ep",), rank=5)
        [5, 7]
        >>> Layout(pp=1, edp=2, ep=2, tp=2).members(("edp", "ep"), rank=5)
        [1, 3, 5, 7]
        """
        import torch

        here = torch.unravel_index(torch.tensor(rank), self.sizes)
        index = tuple(slice(None) if axis in axes else int(here[i]) for i, axis in enumerate(AXES))
        return self.ranks[index].flatten().tolist()
