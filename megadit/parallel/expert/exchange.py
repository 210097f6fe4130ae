"""Tokens to the ranks that hold their experts, and back: two all-to-alls.

With a capacity every shape is fixed in advance: each expert takes C tokens of each routing group. So the exchange is
equal-split, and there are no counts to exchange, no padding and no host sync. Without one (dropless token choice) the
ranks know how many rows go where, and the ragged pair moves as many. Shapes: P ranks of the expert axis, L experts on
this rank, N picks of one source rank for one expert (routing groups x C), D width.
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


class _RaggedAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = group.all_to_all_ragged(x, sent, received)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.group.all_to_all_ragged(grad, ctx.received, ctx.sent), None, None, None


def dispatch_ragged(x_ND: Tensor, sent_PL: list[list[int]], received_PL: list[list[int]], group: Group) -> Tensor:
    """Rows sorted by [destination rank, its expert], so many of each -> rows sorted by [local expert, source rank]."""
    arrived_MD = _RaggedAllToAll.apply(x_ND, [sum(row) for row in sent_PL], [sum(row) for row in received_PL], group)
    return _reorder(arrived_MD, received_PL)


def combine_ragged(y_MD: Tensor, sent_PL: list[list[int]], received_PL: list[list[int]], group: Group) -> Tensor:
    """The inverse of `dispatch_ragged`, for the same counts."""
    by_expert_LP = [list(column) for column in zip(*received_PL, strict=True)]
    outgoing_MD = _reorder(y_MD, by_expert_LP)
    return _RaggedAllToAll.apply(outgoing_MD, [sum(row) for row in received_PL], [sum(row) for row in sent_PL], group)


def _reorder(x_ND: Tensor, counts_AB: list[list[int]]) -> Tensor:
    """Rows in blocks [a, b] of so many each -> the same blocks in the order [b, a]."""
    if len(counts_AB) == 1 or len(counts_AB[0]) == 1:
        return x_ND
    blocks = x_ND.split([count for row in counts_AB for count in row])
    columns = len(counts_AB[0])
    return torch.cat([blocks[a * columns + b] for b in range(columns) for a in range(len(counts_AB))])
