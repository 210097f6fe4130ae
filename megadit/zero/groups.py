"""What both engines share: which parameters are reduced together, and the norm's share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of

NamedParameters = Sequence[tuple[str, nn.Parameter]]
Member = TypeVar("Member")

MAX_BUCKET = 1 << 27  # elements that ZeRO reduces at once


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one weight decay whose gradients are summed over the same data-parallel axes."""

    named: NamedParameters
    data_axes: tuple[str, ...]
    weight_decay: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]

    @property
    def is_expert(self) -> bool:
        return self.data_axes == ("edp",)


def group_parameters(
    named: NamedParameters, weight_decay: float, decays: Callable[[str], bool]
) -> list[ParameterGroup]:
    """Dense and expert parameters, each with and without decay. Groups that would be empty are left out."""
    keys = [(placement_of(parameter).data_axes, weight_decay if decays(name) else 0.0) for name, parameter in named]
    return [ParameterGroup(group, *key) for key, group in in_groups(named, keys)]


def in_groups(
    members: Iterable[Member], keys: Iterable[tuple[tuple[str, ...], float]]
) -> list[tuple[tuple[tuple[str, ...], float], list[Member]]]:
    """Members of equal (data axes, weight decay) together: the groups in the order in which they are reduced."""
    groups: dict[tuple[tuple[str, ...], float], list[Member]] = {}
    for member, key in zip(members, keys, strict=True):
        groups.setdefault(key, []).append(member)
    return sorted(groups.items(), key=lambda item: item[0], reverse=True)


@dataclass(frozen=True)
class Fragment:
    """Optimizer state of one parameter on this rank: `flat`, a live 1-D view, covers elements [start, start + len)
    of the parameter's local tensor. `sharded` names the axes along which ranks hold different ranges.
    """

    name: str
    kind: str  # "master", "exp_avg" or "exp_avg_sq"; "weight" for a parameter that is its own master
    start: int
    flat: Tensor
    sharded: tuple[str, ...]


class Update(NamedTuple):
    """What a step of an engine did; the same on every rank."""

    norm: Tensor  # of the whole gradient before clipping, 0-dim, on the device
    applied: bool  # False: the norm or a loss is not finite, so that nothing has changed
    grad_norm: float  # the norm, on the host
    loss: float  # the sum of all ranks' losses
    told: float  # the sum of what each rank told


class Engine(Protocol):
    """Reduces gradients and updates parameters. A step: accumulate after each backward pass, reduce_gradients, step."""

    @property
    def is_sound(self) -> bool:
        """Whether all gradients that this rank brought to the last step, before any were summed, are finite."""

    def accumulate(self) -> None:
        """After the backward pass of one microbatch of a stage: take gradients that must not pile up in `p.grad`."""

    def reduce_gradients(self) -> None:
        """Sum gradients over tp where partial, then over dp (experts: edp), and divide all by the size of dp.

        After the last microbatch; what is still in `p.grad` is accumulated first.
        """

    def step(self, lr: float, loss: Tensor, told: float = 0.0) -> Update:
        """Clip, update, clear the gradients; where the gradient's norm or any rank's `loss` is not finite, only clear.

        All ranks learn the sum of the numbers that they have `told`, in the norm's own all-reduce.
        """

    def fragments(self) -> list[Fragment]:
        """The live state, for saving, or for loading in place before the first step."""

    def masters(self) -> list[Fragment]:
        """What a step updates, live: this rank's float32 masters, or the parameters where those are their own."""

    def masters_changed(self) -> None:
        """Call after writing into `masters()`: the parameters follow. Collective over the data-parallel axes."""

    def restored(self, steps: int) -> None:
        """Call after loading into `masters()` and `fragments()`: the state has made `steps` steps. Collective."""


def sum_partial(gradients: Iterable[tuple[nn.Parameter, Tensor]], grid: Grid) -> None:
    """Sum over the tensor axis the gradients of parameters that saw only part of the work, in one all-reduce."""
    partial = [gradient for parameter, gradient in gradients if "tp" in placement_of(parameter).partial]
    all_reduce_gradients(partial, ("tp",), grid, divide_by=1)


def all_reduce_gradients(gradients: Sequence[Tensor], axes: tuple[str, ...], grid: Grid, divide_by: int) -> None:
    """One all-reduce of all the gradients as a flat buffer; in place."""
    group = grid["dp"] if axes == ("edp", "ep") else grid[axes[0]]
    if not gradients or (group.size == 1 and divide_by == 1):
        return
    flat = group.all_reduce(torch.cat([g.reshape(-1) for g in gradients]))
    flat = flat / divide_by
    for gradient, reduced in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(reduced.view_as(gradient))


def global_norm(
    owned: Iterable[Tensor], grid: Grid, like: Tensor, is_sound: Tensor, loss: Tensor, told: float
) -> tuple[Tensor, Tensor]:
    """The Euclidean norm over all parameters, from the tensors that this rank owns: ONE all-reduce of the world.

    One for all parameter groups, so that a stage without experts makes as many collectives as one with them. With it
    go this rank's loss and what it tells the others: returns the norm, and the sums [squares, loss, told]. The norm is
    NaN where a rank is not sound: of a replica that nobody owns, it would not know.
    """
    squares = torch.zeros((), dtype=like.dtype, device=like.device)
    for gradient in owned:
        squares += torch.linalg.vector_norm(gradient).square()
    squares = squares.where(is_sound.to(squares.device), torch.nan)
    sums = grid["world"].all_reduce(torch.stack([squares, loss.to(squares), torch.full_like(squares, told)]))
    return sums[0].sqrt(), sums


def read_update(norm: Tensor, sums: Tensor) -> Update:
    """What `global_norm` returned, on the host, which waits here for the backward pass: the step's one host sync."""
    if sums.is_meta:  # a dry run: nothing is computed
        return Update(norm, applied=True, grad_norm=0.0, loss=0.0, told=0.0)
    squares, loss, told = sums.tolist()  # host sync
    return Update(norm, math.isfinite(squares) and math.isfinite(loss), math.sqrt(squares), loss, told)


def all_finite(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Whether every element of every tensor is finite, a 0-dim tensor on the device: one pass over their memory."""
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=like.device)
    # Squares may overflow where no element does: those of the whole gradient's norm do, then. The largest magnitudes
    # would not, but take six times as long on a CPU.
    return torch.stack(torch._foreach_norm(tensors, 2)).isfinite().all()
