"""Who does what when in a pipeline: the orders of torch.distributed.pipelining's schedules, and the time they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """What a stage does at once for one microbatch.

    "F" is the forward pass and "B" the whole backward pass. zbv cuts the latter: "I" is the gradient of what came into
    the stage, "W" those of its weights. torch leaves out stage 0's "I", for nothing came into it; its "W" is a "B".
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def actions(schedule: str, rank: int, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> list[Action]:
    """What a pipeline rank does in one training step, in torch's order.

    `schedule`: 1f1b (one stage per rank) | interleaved | zbv (two stages per rank).

    >>> print(*actions("1f1b", 0, num_ranks=2, stages_per_rank=1, num_microbatches=3))
    0F0 0F1 0B0 0F2 0B1 0B2
    >>> print(*actions("interleaved", 1, num_ranks=2, stages_per_rank=2, num_microbatches=2))
    1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
    >>> print(*actions("zbv", 1, num_ranks=2, stages_per_rank=2, num_microbatches=2))
    1F0 2F0 1F1 2F1 2I0 2W0 1I0 1W0 2I1 2W1 1I1 1W1
    """
    if schedule == "1f1b":
        assert stages_per_rank == 1, "1f1b has one stage per rank"
        return one_forward_one_backward(rank, num_ranks, num_microbatches)
    if schedule == "interleaved":
        return interleaved(rank, num_ranks, stages_per_rank, num_microbatches)
    assert (schedule, stages_per_rank) == ("zbv", 2), "a V has two stages per rank"
    return zbv(rank, num_ranks, num_microbatches)


def _alternating(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """Some forward passes, then one forward and one backward in turn, then the backward passes that are left."""
    steady = len(forwards) - warmup
    pairs = chain.from_iterable(zip(forwards[warmup:], backwards[:steady], strict=True))
    return [*forwards[:warmup], *pairs, *backwards[steady:]]


def one_forward_one_backward(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """1F1B (arXiv 2006.09503): a rank runs ahead by as many forward passes as there are ranks after it."""
    forwards = [Action("F", rank, microbatch) for microbatch in range(num_microbatches)]
    backwards = [Action("B", rank, microbatch) for microbatch in range(num_microbatches)]
    return _alternating(forwards, backwards, min(num_ranks - 1 - rank, num_microbatches))


def interleaved(rank: int, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> list[Action]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2), depth first.

    A round of microbatches, one for each rank or a few more, goes through the rank's first stage, then through its
    second, and so on; then the next round comes. Backward, the stages are in the opposite order.
    """
    rounds = max(1, num_microbatches // num_ranks)
    assert num_microbatches % rounds == 0, "rounds of microbatches are equal"
    in_round = num_microbatches // rounds
    visits = [
        (turn, first + place)
        for first in range(0, num_microbatches, in_round)
        for turn in range(stages_per_rank)
        for place in range(in_round)
    ]
    forwards = [Action("F", turn * num_ranks + rank, microbatch) for turn, microbatch in visits]
    backwards = [
        Action("B", (stages_per_rank - 1 - turn) * num_ranks + rank, microbatch) for turn, microbatch in visits
    ]
    warmup = (stages_per_rank - 1) * in_round + 2 * (num_ranks - 1 - rank)
    return _alternating(forwards, backwards, min(warmup, len(forwards)))


def zbv(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """ZB-V (arXiv 2401.10241, section 6): stages go down the ranks and up again, and weights' gradients fill the gaps.

    The order is made for at least 2 `num_ranks` - 1 microbatches; for fewer, it is the same without the others.
    """
    filled = max(2 * num_ranks - 1, num_microbatches)
    before, after = rank, num_ranks - rank  # `after` counts this rank too
    down, up = rank, 2 * num_ranks - 1 - rank
    phases: list[tuple[list[tuple[Kind, int]], int]] = [
        ([("F", down)], 2 * after - 1),
        ([("F", up), ("F", down)], before),
        ([("F", up), ("I", up), ("W", up)], after),
        # Steady: the second of these lacks the first's forward pass, for all microbatches have come in.
        ([("F", down), ("I", down), ("W", down), ("F", up), ("I", up), ("W", up)], filled - num_ranks - after + 1),
        ([("I", down), ("W", down), ("F", up), ("I", up), ("W", up)], after - 1),
        ([("I", down), ("I", up)], before),
        ([("I", down), ("W", down)], after),
        ([("W", up)], before),
        ([("W", down)], before),
    ]
    order: list[Action] = []
    count: Counter[tuple[Kind, int]] = Counter()
    for turns, repeats in phases:
        for turn in turns * repeats:
            order.append(Action(*turn, count[turn]))
            count[turn] += 1
    return [action for action in order if action.microbatch < num_microbatches]


def orders(schedule: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> list[list[Action]]:
    """`actions` of every rank of a pipeline."""
    return [actions(schedule, rank, num_ranks, stages_per_rank, num_microbatches) for rank in range(num_ranks)]


class Span(NamedTuple):
    """An action and when it runs, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every rank of a pipeline does when."""

    ranks: list[list[Span]]

    @property
    def total(self) -> float:
        """Seconds until the last action ends."""
        return max(spans[-1].end for spans in self.ranks)

    @property
    def busy(self) -> list[float]:
        """Seconds that each rank computes."""
        return [sum(span.end - span.start for span in spans) for spans in self.ranks]

    @property
    def bubble(self) -> float:
        """The part of the time in which even the busiest rank waits: what order and transfers cost."""
        return 1 - max(self.busy) / self.total

    @property
    def imbalance(self) -> float:
        """The part of the busiest rank's work that the mean rank does not have: what uneven stages cost.

        All ranks together compute (1 - bubble) (1 - imbalance) of the time.
        """
        return 1 - sum(self.busy) / len(self.busy) / max(self.busy)


def timeline(
    orders: Sequence[Sequence[Action]],
    duration: Callable[[Action], float],
    transfer: Callable[[int, int], float],
    prefetch: bool,
) -> Timeline:
    """Every action as early as its rank and what it needs allow.

    `orders`: the actions of each rank. `duration(action)` and `transfer(stage, next stage)` are in seconds; between
    stages of one rank nothing is sent. `prefetch`: whether a rank receives while it computes, as under interleaved and
    zbv, for which torch posts receives ahead. Under 1F1B it posts one when the rank is free, and waits: the transfer
    starts when both ranks are there. Transfers do not slow one another down.

    Raises ValueError for orders that wait for one another forever.
    """
    rank_of = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    ends: dict[tuple[str, int, int], float] = {}  # of (kind, stage, microbatch); an "I" is what a "B" is to others
    ranks: list[list[Span]] = [[] for _ in orders]

    def start_of(action: Action, free: float) -> float | None:
        """When an action starts on a rank that is free; None while something that it needs has not run."""
        start = free
        for kind, stage in _needs(action, len(rank_of)):
            end = ends.get((kind, stage, action.microbatch))
            if end is None:
                return None
            if rank_of[stage] != rank_of[action.stage]:
                seconds = transfer(stage, action.stage)
                start = max(start, end + seconds) if prefetch else max(start, end) + seconds
        return start

    def advance(rank: int) -> bool:
        """Runs all the actions that a rank can; False if that is none."""
        spans, before = ranks[rank], len(ranks[rank])
        for action in orders[rank][before:]:
            start = start_of(action, spans[-1].end if spans else 0.0)
            if start is None:
                break
            end = start + duration(action)
            ends["B" if action.kind == "I" else action.kind, action.stage, action.microbatch] = end
            spans.append(Span(action, start, end))
        return len(spans) > before

    while any([advance(rank) for rank in range(len(orders))]):  # a list: every rank, not up to the first that can
        pass
    waiting = [str(order[len(spans)]) for order, spans in zip(orders, ranks, strict=True) if len(spans) < len(order)]
    if waiting:
        raise ValueError(f"these actions wait for one another: {', '.join(waiting)}")
    return Timeline(ranks)


def _needs(action: Action, num_stages: int) -> list[tuple[str, int]]:
    """(kind, stage) of what must have run before, for the same microbatch."""
    stage = action.stage
    if action.kind == "F":
        return [("F", stage - 1)] if stage > 0 else []
    if action.kind == "W":
        return [("B", stage)]
    return [("F", stage), ("B", stage + 1)] if stage < num_stages - 1 else [("F", stage)]


class InFlight(NamedTuple):
    """How many microbatches a stage keeps tensors of."""

    whole: int  # for all of the backward pass
    weights: int  # for the gradients of weights only: their "I" has run, their "W" has not ended


def in_flight(order: Sequence[Action]) -> list[dict[int, InFlight]]:
    """For each action of a rank: the microbatches that each of its stages keeps while it runs, its own included.

    >>> [kept[0].whole for kept in in_flight(actions("1f1b", 0, 2, stages_per_rank=1, num_microbatches=3))]
    [1, 2, 2, 2, 2, 1]
    """
    kept = {action.stage: InFlight(0, 0) for action in order}
    during = []
    for kind, stage, _ in order:
        whole, weights = kept[stage]
        if kind == "F":
            kept[stage] = InFlight(whole + 1, weights)
        during.append(dict(kept))
        if kind == "B" or (kind, stage) == ("W", 0):
            kept[stage] = InFlight(whole - 1, weights)
        elif kind == "I" and stage > 0:  # stage 0's is left out
            kept[stage] = InFlight(whole - 1, weights + 1)
        elif kind == "W":
            kept[stage] = InFlight(whole, weights - 1)
    return during


def backward_turns(order: Sequence[Action], stages: Sequence[int]) -> tuple[int, ...]:
    """Which of a rank's `stages`, as indices, each backward pass ends for; a turn that nothing is new in is left out.

    Something is new while the stages that have had a turn are not those of an earlier turn of the same stage.

    >>> backward_turns(actions("interleaved", 0, 2, stages_per_rank=2, num_microbatches=4), stages=[0, 2])
    (1, 1, 0, 0, 1)
    """
    turns: list[int] = []
    found: set[tuple[int, frozenset[int]]] = set()
    for kind, stage, _ in order:
        turn = stages.index(stage), frozenset(turns)
        if kind in "BW" and turn not in found:
            found.add(turn)
            turns.append(turn[0])
    return tuple(turns)
