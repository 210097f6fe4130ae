"""One short training on some ranks, put together again into whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadit.model import moe
from megadit.parallel.init import Normal
from megadit.training.build import Run
from megadit.training.config import load_config
from megadit.training.state import logical_state
from megadit.training.step import read
from tests.ranks import run_ranks
from tests.training.assembled import assembled, make_step, redraw

CONFIG = "tests/configs/parity.yaml"
TIE = 5e-6  # relative; rounding to float32 moves half of the affinities by 5e-7 or less, and one in a thousand by this

Owned = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], Any]]]]  # name -> shape, (offsets, values)


@dataclass(frozen=True)
class Result:
    """Of a whole training: a number per step, the parameters after the last step, the gradients of the first."""

    losses: list[float]
    norms: list[float]
    routing: list[dict[str, float]]
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class AroundOne:
    """Normal elements whose mean is 1."""

    std: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return Normal(self.std).draw(shape, generator) + 1


def init_of(name: str) -> AroundOne | Normal:
    """No parameter is zero or one, so that every path carries a gradient. Small: rounding must not grow on its way."""
    return AroundOne(0.2) if name.endswith("norm.weight") else Normal(0.1)


def start(rank: int, world_size: int, overrides: Sequence[str]) -> Run:
    """A run on this rank with the weights of `init_of`."""
    run = assembled(rank, world_size, *overrides, path=CONFIG)
    redraw(run, 1, init_of)
    return run


def owned(run: Run, kind: str) -> Owned:
    """This rank's part of the state of one kind, as numpy copies; no two ranks bring the same elements."""
    state = logical_state(run.named, run.ema, run.engine, run.grid, owned_only=True)
    return {
        key.removeprefix(f"{kind}."): (
            logical.shape,
            [(piece.offsets, piece.tensor.detach().numpy().copy()) for piece in logical.pieces],
        )
        for key, logical in state.items()
        if key.startswith(f"{kind}.")
    }


Start = Callable[[int, int, Sequence[str]], Run]


def train(rank: int, world_size: int, overrides: Sequence[str], begin: Start = start) -> tuple[Any, ...]:
    """(losses, gradient norms, routing statistics, parameters, first moments after the first step) of this rank."""
    run = begin(rank, world_size, overrides)
    unread, moments = [], {}
    for step in range(1, run.config.run.steps + 1):
        unread.append(make_step(run, step))
        if step == 1:
            moments = owned(run, "exp_avg")
    reports = read(run, unread)
    routing = [dict(flat_statistics(report.routing)) for report in reports]
    return [r.loss for r in reports], [r.grad_norm for r in reports], routing, owned(run, "weight"), moments


def flat_statistics(routing: dict[int, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """("layer.name", value), and ("layer.name.expert", value) of what is known for each expert."""
    for layer, stats in routing.items():
        for name, value in stats.items():
            if isinstance(value, list):
                yield from ((f"{layer}.{name}.{expert}", each) for expert, each in enumerate(value))
            else:
                yield f"{layer}.{name}", value


def assemble(ranks: Sequence[Owned]) -> dict[str, Tensor]:
    """Whole tensors in float64; an element that no rank owns is NaN, which equals nothing."""
    whole: dict[str, Tensor] = {}
    for name, (shape, pieces) in (item for rank in ranks for item in rank.items()):
        tensor = whole.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
        for offsets, values in pieces:
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, values.shape, strict=True))
            assert tensor[place].isnan().all(), f"two ranks own the same part of {name}"
            tensor[place] = torch.from_numpy(values).double()
    return whole


@contextmanager
def watched_choices() -> Iterator[list[float]]:
    """How near the first one that is not chosen comes to the last one that is, relative, for each call the nearest."""
    by_expert, by_token, gaps = moe.expert_choice, moe.token_choice, []

    def note(affinity: Tensor, dim: int, count: int) -> None:
        affinity = affinity.detach()
        ranked = affinity.sort(dim=dim, descending=True).values
        last, next_one = ranked.select(dim, count - 1), ranked.select(dim, count)
        # What a softmax or a sigmoid returns is rounded relative to itself, a logit relative to all of its sum.
        scale = last if bool((affinity > 0).all()) else affinity.abs().mean()
        gaps.append(float(((last - next_one) / scale).min()))

    def expert_choice(affinity_GSE: Tensor, capacity: int) -> moe.Picks:
        if capacity < affinity_GSE.shape[1]:
            note(affinity_GSE, 1, capacity)
        return by_expert(affinity_GSE, capacity)

    def token_choice(affinity_GSE: Tensor, top_k: int) -> moe.Choices:
        for count in range(1, top_k + 1):  # the order counts too: first choices are seated first
            note(affinity_GSE, 2, count)
        return by_token(affinity_GSE, top_k)

    moe.expert_choice, moe.token_choice = expert_choice, token_choice
    try:
        yield gaps
    finally:
        moe.expert_choice, moe.token_choice = by_expert, by_token


def train_without_ties(rank: int, world_size: int, overrides: Sequence[str], first: int) -> tuple[Any, ...]:
    """(seed, what `train` returns) of the first seed, from `first` on, with no choice that float32 could turn round."""
    for seed in range(first, first + 30):
        with watched_choices() as gaps:
            trained = train(rank, world_size, (*overrides, f"run.seed={seed}"))
        if min(gaps, default=1.0) > TIE:
            return seed, *trained
    raise AssertionError("every seed has a near-tie")


def result_of(world_size: int, overrides: Sequence[str], begin: Start = start) -> Result:
    """Train on so many ranks; all of them must report the same."""
    ranks = run_ranks(train, world_size, tuple(overrides), begin)
    for reported in list(zip(*ranks, strict=True))[:3]:
        assert all(other == reported[0] for other in reported), "the ranks report different numbers"
    return whole_result(ranks, overrides)


def oracle(overrides: Sequence[str], first_seed: int) -> tuple[int, Result]:
    """(seed, result) of one process. The seed is the first one, from `first_seed` on, that makes no near-tie."""
    ((seed, *trained),) = run_ranks(train_without_ties, 1, tuple(overrides), first_seed)
    return seed, whole_result([trained], overrides)


def whole_result(ranks: Sequence[Sequence[Any]], overrides: Sequence[str]) -> Result:
    """From what `train` returned on every rank."""
    losses, norms, routing, parameters, moments = zip(*ranks, strict=True)
    # The first step leaves (1 - beta1) x clipped gradient in AdamW's first moment, in every engine.
    optim = load_config(CONFIG, overrides).optim
    factor = (1 - optim.betas[0]) * min(1.0, optim.clip / (norms[0][0] + 1e-6))
    gradients = {name: moment / factor for name, moment in assemble(moments).items()}
    return Result(losses[0], norms[0], routing[0], assemble(parameters), gradients)
