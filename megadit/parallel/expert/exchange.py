"""Tokens to the ranks that hold their experts, and back: two equal-split all-to-alls.

Expert choice fixes every shape in advance: each expert takes C tokens of each routing group. So there is no exchange of
counts, no padding and no host sync. Shapes: P ranks of the expert axis, L experts on this rank, N picks of one source
rank for one expert (routing groups x C), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadit.parallel.grid import Group


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = group.all_to_all(x)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # An equal-split exchange is its own adjoint.
        return ctx.group.all_to_all(grad), None


def dispatch(x_PLND: Tensor, group: Group) -> Tensor:
    """[destination rank, its expert, pick, width] -> [local expert, picks of all source ranks, width]."""
    received_PLND = _AllToAll.apply(x_PLND, group)
    return received_PLND.transpose(0, 1).flatten(1, 2)


def combine(y_LMD: Tensor, group: Group) -> Tensor:
    """The inverse of `dispatch`: [local expert, picks of all ranks, width] -> [rank, its expert, pick, width]."""
    outgoing_PLND = y_LMD.unflatten(1, (group.size, -1)).transpose(0, 1)
    return _AllToAll.apply(outgoing_PLND, group)
