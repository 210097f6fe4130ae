"""Who does what when in a pipeline: the orders of torch.distributed.pipelining's schedules, and the time they take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

from megadit.parallel.pipeline.partition import stage_indices

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


class Step(NamedTuple):
    """An action in the sequence of all ranks' actions.

    pair: the place of its (kind, stage) in `Program.pairs`. needs: places in the sequence of what must have run before,
    besides what the rank did last, each with the place in `Program.edges` of the transfer in between, or -1.
    """

    rank: int
    pair: int
    needs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Program:
    """What the ranks of a pipeline do in a training step, however long that takes. Arguments as of `orders`."""

    schedule: str
    num_ranks: int
    stages_per_rank: int
    num_microbatches: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without what follows from the four."""
        return Program, (self.schedule, self.num_ranks, self.stages_per_rank, self.num_microbatches)

    @cached_property
    def orders(self) -> list[list[Action]]:
        return orders(self.schedule, self.num_ranks, self.stages_per_rank, self.num_microbatches)

    @cached_property
    def stages(self) -> list[list[int]]:
        """The stages of each rank."""
        return [
            stage_indices(self.schedule, rank, self.num_ranks, self.stages_per_rank) for rank in range(self.num_ranks)
        ]

    @cached_property
    def pairs(self) -> list[tuple[Kind, int]]:
        """Every (kind, stage) of an action."""
        kinds: tuple[Kind, ...] = ("F", "I", "W") if self.schedule == "zbv" else ("F", "B")
        return [(kind, stage) for stages in self.stages for stage in stages for kind in kinds]

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """(sender, receiver): neighbouring stages of different ranks, both ways."""
        pairs = [(stage, stage + 1) for stage in range(self.num_ranks * self.stages_per_rank - 1)]
        across = [pair for pair in pairs if not any(set(pair) <= set(stages) for stages in self.stages)]
        return across + [(receiver, sender) for sender, receiver in across]

    @cached_property
    def steps(self) -> list[Step]:
        """All ranks' actions, each after everything that it needs."""
        return in_sequence(self.orders, self.pairs, self.edges)

    @cached_property
    def moments(self) -> list[list[Moment]]:
        """Of each rank: `moments` of its order."""
        return [moments(order) for order in self.orders]

    @cached_property
    def turns(self) -> list[tuple[int, ...]]:
        """Of each rank: `backward_turns` of its order."""
        return [backward_turns(*pair) for pair in zip(self.orders, self.stages, strict=True)]

    def timeline(self, duration: Callable[[Kind, int], float], transfer: Callable[[int, int], float]) -> Timeline:
        """Every action as early as its rank and what it needs allow.

        `duration(kind, stage)` and `transfer(sender, receiver)`, of stages, are in seconds; between stages of one rank
        nothing is sent. Transfers do not slow one another down.
        """
        durations, transfers = [duration(*pair) for pair in self.pairs], [transfer(*edge) for edge in self.edges]
        _, ends = self.play(durations, transfers)
        seconds = dict(zip(self.pairs, durations, strict=True))  # each once for every microbatch
        busy = [
            self.num_microbatches * sum(taken for (_, stage), taken in seconds.items() if stage in stages)
            for stages in self.stages
        ]
        return Timeline(self, durations, transfers, max(ends), busy)

    def play(self, durations: Sequence[float], transfers: Sequence[float]) -> tuple[list[float], list[float]]:
        """Start and end of each step.

        Interleaved and zbv receive while they compute: torch posts their receives ahead. Under 1F1B it posts one when
        the rank is free, and waits: the transfer starts when both ranks are there.
        """
        ahead = self.schedule != "1f1b"
        free, starts, ends = [0.0] * self.num_ranks, list[float](), list[float]()
        transfers = [*transfers, 0.0]  # the last one is where nothing is sent
        for rank, pair, needs in self.steps:
            start = free[rank]
            for place, edge in needs:
                if ahead:
                    start = max(start, ends[place] + transfers[edge])
                else:
                    start = max(start, ends[place]) + transfers[edge]
            free[rank] = start + durations[pair]
            starts.append(start)
            ends.append(free[rank])
        return starts, ends


@dataclass(frozen=True)
class Timeline:
    """What every rank of a pipeline does when.

    durations: seconds of `program.pairs`. transfers: seconds of `program.edges`. total: seconds until the last action
    ends. busy: seconds that each rank computes.
    """

    program: Program
    durations: list[float]
    transfers: list[float]
    total: float
    busy: list[float]

    @property
    def ranks(self) -> list[list[Span]]:
        """Of each rank: its actions, in their order."""
        program, spans = self.program, [list[Span]() for _ in self.busy]
        left = [iter(order) for order in program.orders]
        times = zip(*program.play(self.durations, self.transfers), strict=True)
        for step, (start, end) in zip(program.steps, times, strict=True):
            spans[step.rank].append(Span(next(left[step.rank]), start, end))
        return spans

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


def in_sequence(
    orders: Sequence[Sequence[Action]], pairs: Sequence[tuple[Kind, int]], edges: Sequence[tuple[int, int]]
) -> list[Step]:
    """All actions, each after its rank's last and after everything else that it needs.

    `pairs` and `edges`: as in `Program`. Raises ValueError for orders that wait for one another forever.
    """
    edge_at = {edge: place for place, edge in enumerate(edges)}
    num_stages = 1 + max(stage for _, stage in pairs)
    # Of (kind, stage): where each microbatch's is in the sequence. An "I" is what a "B" is to others.
    places = defaultdict[tuple[str, int], dict[int, int]](dict)
    told = {
        (kind, stage): (
            place,
            places["B" if kind == "I" else kind, stage],
            [(places[needed], edge_at.get((needed[1], stage), -1)) for needed in _needs(kind, stage, num_stages)],
        )
        for place, (kind, stage) in enumerate(pairs)
    }
    steps: list[Step] = []
    done = [0] * len(orders)

    def advance(rank: int) -> bool:
        """Runs all the actions that a rank can; False if that is none."""
        order, before = orders[rank], done[rank]
        for at in range(before, len(order)):
            kind, stage, microbatch = order[at]
            pair, own, needs = told[kind, stage]
            try:
                step = Step(rank, pair, tuple([(there[microbatch], edge) for there, edge in needs]))
            except KeyError:  # has not run yet
                return at > before
            own[microbatch] = len(steps)
            steps.append(step)
            done[rank] += 1
        return len(order) > before

    while any([advance(rank) for rank in range(len(orders))]):  # a list: every rank, not up to the first that can
        pass
    waiting = [str(order[ran]) for order, ran in zip(orders, done, strict=True) if ran < len(order)]
    if waiting:
        raise ValueError(f"these actions wait for one another: {', '.join(waiting)}")
    return steps


def _needs(kind: Kind, stage: int, num_stages: int) -> list[tuple[str, int]]:
    """(kind, stage) of what must have run before, for the same microbatch."""
    if kind == "F":
        return [("F", stage - 1)] if stage > 0 else []
    if kind == "W":
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


class Moment(NamedTuple):
    """While an action runs, it and the microbatches that the stages keep are what memory is needed for.

    kept: as `in_flight` tells it. before: how many actions of each (kind, stage) have run on the rank.
    """

    kind: Kind
    stage: int
    kept: dict[int, InFlight]
    before: Counter[tuple[Kind, int]]


def moments(order: Sequence[Action]) -> list[Moment]:
    """Every moment of a rank once; of those that differ only in what has run before, the last."""
    last: dict[tuple[Any, ...], int] = {}
    during = in_flight(order)
    for place, (action, kept) in enumerate(zip(order, during, strict=True)):
        last[action[:2], tuple(kept.values())] = place
    found, before, wanted = [], Counter[tuple[Kind, int]](), set(last.values())
    for place, (kind, stage, _) in enumerate(order):
        if place in wanted:
            found.append(Moment(kind, stage, during[place], before.copy()))
        before[kind, stage] += 1
    return found


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
