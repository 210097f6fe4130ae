"""A run's state as named logical tensors: what a checkpoint holds, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Container

from torch import Tensor, nn

from megadit.checkpoint import LogicalTensor, Piece, flat_range_boxes
from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of
from megadit.training.ema import Ema
from megadit.zero.groups import Engine, Fragment, NamedParameters


def logical_state(
    named: NamedParameters, ema: Ema, engine: Engine, grid: Grid, owned_only: bool
) -> dict[str, LogicalTensor]:
    """Weights, averages and optimizer state under `weight.`, `ema.`, `master.`, `exp_avg.` and `exp_avg_sq.`.

    The pieces are live views. `owned_only`, for saving: of all ranks that hold the same elements one brings them.
    Otherwise all that this rank holds.
    """
    parameters = dict(named)
    weights = [Fragment(name, "weight", 0, parameter.data.view(-1), sharded=()) for name, parameter in named]
    state: dict[str, LogicalTensor] = {}
    for fragment in (*weights, *ema.averages, *engine.fragments()):
        parameter = parameters[fragment.name]
        if not owned_only or placement_of(parameter).is_owner(grid, fragment.sharded):
            state[f"{fragment.kind}.{fragment.name}"] = logical_fragment(parameter, fragment, grid)
    return state


def resumable_state(
    named: NamedParameters, ema: Ema, engine: Engine, grid: Grid, saved: Container[str]
) -> dict[str, LogicalTensor]:
    """What a run reads to go on from a checkpoint that holds the tensors `saved`: all but what follows from it.

    Those are the parameters, where they are rounded masters. The masters are read from `master.`; of a checkpoint of
    `zero.stage=0`, whose weights are their own masters, from `weight.`.
    """
    parameters = dict(named)
    state: dict[str, LogicalTensor] = {}
    for fragment in (*engine.masters(), *ema.averages, *engine.fragments()):
        kind, name = fragment.kind, fragment.name
        if kind in ("master", "weight"):
            kind = "master" if f"master.{name}" in saved else "weight"
        state[f"{kind}.{name}"] = logical_fragment(parameters[name], fragment, grid)
    return state


def logical_fragment(parameter: nn.Parameter, fragment: Fragment, grid: Grid) -> LogicalTensor:
    """The elements of one parameter that a fragment covers, as boxes of the logical tensor."""
    return logical_tensor(parameter, grid, fragment.start, fragment.flat)


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
