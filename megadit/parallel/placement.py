"""How one parameter lies on the grid: the one tag that initialisation, reduction, norm and checkpoint derive from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megadit.parallel.grid import Grid


@dataclass(frozen=True)
class Cut:
    """Dimension `dim` is cut into equal parts over `axes`, read as one number with the last axis fastest."""

    dim: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Which dimensions are cut over which axes, and over which axes each rank's gradient is only a part of the sum."""

    cuts: tuple[Cut, ...] = ()
    partial: tuple[str, ...] = ()

    @property
    def cut_axes(self) -> frozenset[str]:
        """The axes along which ranks hold different parts."""
        return frozenset(axis for cut in self.cuts for axis in cut.axes)

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The data-parallel axes that hold replicas: what the gradient is summed over (an expert's: edp alone)."""
        return tuple(axis for axis in ("edp", "ep") if axis not in self.cut_axes)

    def logical_shape(self, local: Sequence[int], grid: Grid) -> tuple[int, ...]:
        """The whole tensor's shape, from this rank's."""
        shape = list(local)
        for cut in self.cuts:
            shape[cut.dim] *= grid.size(cut.axes)
        return tuple(shape)

    def offsets(self, local: Sequence[int], grid: Grid) -> tuple[int, ...]:
        """Where this rank's part begins in the whole tensor."""
        begin = [0] * len(local)
        for cut in self.cuts:
            begin[cut.dim] = grid.coordinate(cut.axes) * local[cut.dim]
        return tuple(begin)

    def is_owner(self, grid: Grid, sharded: Sequence[str] = ()) -> bool:
        """True on exactly one of the ranks that hold the same elements.

        `sharded` names further axes along which the holders already differ (ZeRO's partitions).
        """
        return all(
            grid[axis].rank == 0 for axis in ("edp", "ep", "tp") if axis not in self.cut_axes and axis not in sharded
        )


REPLICATED = Placement()


def placed(
    shape: Sequence[int], placement: Placement = REPLICATED, **factory: torch.dtype | torch.device
) -> nn.Parameter:
    """An uninitialised parameter of this rank's `shape`, tagged with its placement."""
    parameter = nn.Parameter(torch.empty(*shape, **factory))  # type: ignore[call-overload]
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: nn.Parameter) -> Placement:
    """The tag of a parameter. Every parameter of a megadit model has one."""
    placement = getattr(parameter, "placement", None)
    assert isinstance(placement, Placement), f"a parameter of shape {tuple(parameter.shape)} has no placement"
    return placement
