"""The autograd pairs of tensor parallelism, and the two regions made of them.

Each pair is a collective forward and its adjoint backward, for one reading of the gradient (Shoeybi et al. 2019,
arXiv 1909.08053, f and g; Korthikanti et al. 2022, arXiv 2205.05198, g and g-bar):

    pair            forward          backward          between
    Enter           identity         all-reduce        replicated tokens   -> work cut over the group
    Leave           all-reduce       identity          partial sums        -> replicated tokens
    Gather          all-gather       split             a cut tensor        -> replicated, same gradient on every rank
    Split           split            all-gather        replicated          -> a cut tensor
    GatherSum       all-gather       reduce-scatter    a cut tensor        -> replicated, gradients that must be summed
    ReduceScatter   reduce-scatter   all-gather        partial sums        -> a cut tensor
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megadit.parallel.grid import Group

TOKENS = 1  # the token dimension of x_BTD
FEATURES = -1


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grad), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        out = group.all_gather(x, dim)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.split(grad, ctx.dim), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        out = group.split(x, dim)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.all_gather(grad, ctx.dim), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        out = group.all_gather(x, dim)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.reduce_scatter(grad, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        out = group.reduce_scatter(x, dim)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.all_gather(grad, ctx.dim), None, None


class _CountOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.size = group.size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


def enter(x: Tensor, group: Group) -> Tensor:
    """Where a replicated tensor meets work that is cut over the group: identity forward, sum of gradients backward."""
    return _Enter.apply(x, group)


class Region(Protocol):
    """How tokens lie between the tensor-parallel layers: what a block calls around its cut work.

    `partial` is the tag of parameters that work on tokens between the layers (norms, router, row-parallel biases).
    """

    group: Group
    partial: tuple[str, ...]
    token_parts: int  # into so many the tokens between the layers are cut

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Tokens as they lie between layers -> all tokens, whole on every rank, for work that is cut over the group."""

    def leave(self, x_BTD: Tensor) -> Tensor:
        """Each rank's share of a sum, over all tokens -> the sum, with tokens as they lie between layers."""

    def gather_features(self, x: Tensor) -> Tensor:
        """A column-parallel output that modulates tokens between layers -> whole on every rank."""

    def split_tokens(self, x_BTD: Tensor) -> Tensor:
        """All tokens, replicated -> tokens as they lie between layers."""

    def collect_tokens(self, x_BTD: Tensor) -> Tensor:
        """Tokens as they lie between layers -> all tokens, replicated."""

    def sum_tokens(self, x: Tensor) -> Tensor:
        """A sum over the tokens as they lie between layers -> the sum over all tokens, replicated."""

    def count_once(self, x: Tensor) -> Tensor:
        """An entered tensor for work between the layers. Work that every rank repeats would count its gradient on each
        of them in the sum at entering."""

    def enter_between(self, x: Tensor) -> Tensor:
        """A replicated tensor for work between the layers: its gradient is a sum over tokens, and so over the ranks
        where the tokens are cut."""


class ReplicatedTokens:
    """Every rank of the group holds every token between the layers (Megatron's tensor parallelism)."""

    partial: tuple[str, ...] = ()

    def __init__(self, group: Group) -> None:
        self.group, self.token_parts = group, 1

    def enter(self, x_BTD: Tensor) -> Tensor:
        return _Enter.apply(x_BTD, self.group)

    def leave(self, x_BTD: Tensor) -> Tensor:
        return _Leave.apply(x_BTD, self.group)

    def gather_features(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.group, FEATURES)

    def split_tokens(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def collect_tokens(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def sum_tokens(self, x: Tensor) -> Tensor:
        return x

    def count_once(self, x: Tensor) -> Tensor:
        return _CountOnce.apply(x, self.group)

    def enter_between(self, x: Tensor) -> Tensor:
        return x


class CutTokens:
    """Each rank of the group holds its share of the tokens between the layers (sequence parallelism)."""

    partial: tuple[str, ...] = ("tp",)

    def __init__(self, group: Group) -> None:
        self.group, self.token_parts = group, group.size

    def enter(self, x_BTD: Tensor) -> Tensor:
        return _GatherSum.apply(x_BTD, self.group, TOKENS)

    def leave(self, x_BTD: Tensor) -> Tensor:
        return _ReduceScatter.apply(x_BTD, self.group, TOKENS)

    def gather_features(self, x: Tensor) -> Tensor:
        # Each rank modulates its own tokens only, so the gradients differ and must be summed.
        return _GatherSum.apply(x, self.group, FEATURES)

    def split_tokens(self, x_BTD: Tensor) -> Tensor:
        return _Split.apply(x_BTD, self.group, TOKENS)

    def collect_tokens(self, x_BTD: Tensor) -> Tensor:
        return _Gather.apply(x_BTD, self.group, TOKENS)

    def sum_tokens(self, x: Tensor) -> Tensor:
        return _Leave.apply(x, self.group)

    def count_once(self, x: Tensor) -> Tensor:
        return x

    def enter_between(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self.group)
