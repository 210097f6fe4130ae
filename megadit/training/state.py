"""A run's state as named logical tensors: what a checkpoint holds, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from megadit.checkpoint import LogicalTensor, Piece, flat_range_boxes
from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of
from megadit.training.ema import Ema
from megadit.zero import Engine

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def logical_state(
    named: NamedParameters, ema: Ema, engine: Engine, grid: Grid, owned_only: bool
) -> dict[str, LogicalTensor]:
    """Weights, averages and optimizer state under `weight.`, `ema.`, `master.`, `exp_avg.` and `exp_avg_sq.`.

    The pieces are live views. For saving, `owned_only`: of all ranks that hold the same elements one brings them. For
    loading: all that this rank holds.
    """
    parameters = dict(named)
    state: dict[str, LogicalTensor] = {}
    for key, name, start, flat, sharded in _flat_tensors(named, ema, engine):
        parameter = parameters[name]
        if not owned_only or placement_of(parameter).is_owner(grid, sharded):
            state[key] = logical_tensor(parameter, grid, start, flat)
    return state


def _flat_tensors(
    named: NamedParameters, ema: Ema, engine: Engine
) -> Iterator[tuple[str, str, int, Tensor, Sequence[str]]]:
    """(key, parameter's name, first element, 1-D live view, axes along which ranks hold different ranges)."""
    for name, parameter in named:
        yield f"weight.{name}", name, 0, parameter.data.view(-1), ()
        yield f"ema.{name}", name, 0, ema.average[name].view(-1), ()
    for fragment in engine.fragments():
        yield f"{fragment.kind}.{fragment.name}", fragment.name, fragment.start, fragment.flat, fragment.sharded


def logical_tensor(parameter: nn.Parameter, grid: Grid, start: int = 0, flat: Tensor | None = None) -> LogicalTensor:
    """A flat range of the parameter's local tensor (its own elements by default) as boxes of the logical one."""
    flat = parameter.data.view(-1) if flat is None else flat
    placement, local_shape = placement_of(parameter), tuple(parameter.shape)
    origin = placement.offsets(local_shape, grid)
    pieces = []
    for box, begin in flat_range_boxes(local_shape, start, flat.numel()):
        offsets = tuple(o + b for o, b in zip(origin, box.offsets, strict=True))
        pieces.append(Piece(offsets, flat[begin : begin + math.prod(box.sizes)].view(box.sizes)))
    return LogicalTensor(placement.logical_shape(local_shape, grid), flat.dtype, tuple(pieces))
