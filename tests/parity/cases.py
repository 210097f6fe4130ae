"""What parity is shown on: every way to lay ranks out, with the options that may go with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

SCHEDULES = ("1f1b", "interleaved", "zbv")
RECOMPUTE = ("none", "block", "moe")
# ZeRO keeps float32, so it is float32 that it is compared in.
ENGINES = {
    "float64": ("run.dtype=float64", "zero.stage=0"),
    "zero1": ("run.dtype=float32", "zero.stage=1"),
    "zero2": ("run.dtype=float32", "zero.stage=2"),
}
TOKEN_CHOICE = ("model.routing=token_choice", "model.balance_loss=0.1")
MODELS = {
    "expert_choice": (),
    "bias": ("model.bias=true", "model.modulation=scale_shift"),
    "pairs": ("model.routing_group=2",),
    "batch": ("model.routing_group=batch", "model.gate=identity"),
    "capacity": (*TOKEN_CHOICE, "model.capacity_factor=1", "model.normalise_gates=true", "model.balance_counts=first"),
    "dropless": (*TOKEN_CHOICE, "model.dropless=true", "model.routing_group=batch"),
    "nucleus": (
        "model.routing_preset=nucleus",
        *("model.experts=8", "model.expert_ratio=0.5", "model.dense_first=1", "model.capacity_factor=2"),
    ),
    "shared": ("model.gate=sigmoid", "model.shared_experts=2", "model.feedforward=swiglu", "model.moe_every=3"),
    "classes": ("model.conditioning=class", "model.classes=10"),
    "dense": ("model.routing=dense",),
}
# Networks that chosen layouts run, not all of eight ranks. uneven: the first stages have no experts, and the stages are
# not equally long. The others are the shapes of neighbours.
SHAPES = {
    "uneven": ("model.layers=7", "model.dense_first=4"),
    "adaln_single": ("model.modulation=shared", "model.bias=true", "model.router_input=timestep"),
    "per_layer_embedders": ("model.embedders=per_layer", "model.conditioning=class", "model.classes=10"),
}
# Layers for two stages on each of eight ranks, with as many routers as eight layers have.
LONG = ("model.layers=16", "model.moe_every=4")
# Seeds with which no router nearly ties (see `oracle`). A wrong one costs a search.
SEEDS = {"expert_choice": 1, "bias": 3, "batch": 1, "dropless": 2, "nucleus": 3, "shared": 1, "classes": 2}


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis."""

    tp: int
    pp: int
    ep: int
    edp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.ep * self.edp

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-ep{self.ep}-edp{self.edp}"


def layouts_of(world_size: int) -> list[Layout]:
    """Every way to write the number of ranks as tp x pp x ep x edp.

    >>> [len(layouts_of(size)) for size in (1, 4, 8)]
    [1, 10, 20]
    """
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    layouts = (Layout(*degrees) for degrees in product(sizes, repeat=4))
    return [layout for layout in layouts if layout.world_size == world_size]


@dataclass(frozen=True)
class Case:
    """One training: a layout and one value of every option."""

    layout: Layout = Layout(1, 1, 1, 1)
    schedule: str = "1f1b"
    sequence: bool = False
    recompute: str = "none"
    engine: str = "float64"
    model: str = "expert_choice"

    @property
    def is_allowed(self) -> bool:
        """Whether these options can be used together."""
        return not (
            (self.schedule == "zbv" and (self.recompute != "none" or self.engine == "zero2"))
            or (self.sequence and self.layout.tp == 1)
            or (self.model == "dense" and self.layout.ep > 1)
        )

    @property
    def model_overrides(self) -> tuple[str, ...]:
        """What makes the model another one: the one process that it is compared with has it too."""
        num_stages = self.layout.pp * (1 if self.schedule == "1f1b" else 2)
        return (*(MODELS | SHAPES)[self.model], *(LONG if num_stages > 8 else ()))

    @property
    def micro_batch(self) -> int:
        """Images of a microbatch: two microbatches for each pipeline rank where there are enough images.

        No more of them: a step takes as long as its collectives, and each microbatch makes its own. The one process has
        microbatches of two images, which is part of the model where images compete, and of its statistics where
        experts have seats.
        """
        if self.model in ("batch", "capacity", "dropless"):
            return 2
        return max(2, 16 // (self.layout.ep * self.layout.edp * 2 * self.layout.pp))

    @property
    def overrides(self) -> tuple[str, ...]:
        """The case as arguments of the command line."""
        return (
            *self.model_overrides,
            *ENGINES[self.engine],
            f"data.micro_batch={self.micro_batch}",
            f"parallel.tensor={self.layout.tp}",
            f"parallel.pipeline={self.layout.pp}",
            f"parallel.expert={self.layout.ep}",
            f"parallel.schedule={self.schedule}",
            f"parallel.sequence={self.sequence}".lower(),
            f"run.recompute={self.recompute}",
        )

    def __str__(self) -> str:
        words = [self.schedule, "seq" if self.sequence else "", "" if self.recompute == "none" else self.recompute]
        return "-".join(word for word in (str(self.layout), *words, self.engine, self.model) if word)


# The quick tests: every axis, schedule, engine and kind of recompute.
QUICK = [
    Case(Layout(1, 1, 1, 1), "interleaved"),
    Case(Layout(1, 1, 1, 1), "zbv", engine="zero1"),
    Case(Layout(1, 1, 1, 1), engine="zero2", model="dropless"),
    Case(Layout(4, 1, 1, 1), sequence=True),
    Case(Layout(1, 4, 1, 1), recompute="block"),
    Case(Layout(1, 1, 4, 1), recompute="moe"),
    Case(Layout(1, 1, 1, 4), engine="zero2"),
    Case(Layout(2, 2, 1, 1), "zbv", sequence=True),
    Case(Layout(1, 2, 1, 2), "zbv", engine="zero1", model="batch"),
    Case(Layout(1, 4, 1, 1), "zbv", model="classes"),
]
# The slow tests: networks that route otherwise, stages without experts, eight ranks.
SLOW = [
    Case(Layout(2, 1, 1, 2), sequence=True, engine="zero1", model="bias"),
    Case(Layout(2, 1, 2, 1), sequence=True, recompute="moe", model="dropless"),
    Case(Layout(2, 1, 2, 1), sequence=True, model="nucleus"),
    Case(Layout(1, 2, 2, 1), "interleaved", recompute="block", model="pairs"),
    Case(Layout(2, 2, 1, 1), "interleaved", True, "moe", model="shared"),
    Case(Layout(1, 2, 2, 1), "interleaved", engine="zero2", model="capacity"),
    Case(Layout(2, 2, 1, 1), sequence=True, engine="zero1", model="dense"),
    Case(Layout(1, 2, 2, 1), engine="zero2", model="uneven"),
    Case(Layout(2, 2, 1, 1), model="adaln_single"),
    Case(Layout(2, 2, 1, 1), "zbv", model="per_layer_embedders"),
    Case(Layout(1, 1, 2, 2), recompute="block", engine="zero1", model="dropless"),
    Case(Layout(2, 1, 2, 1), model="capacity"),
    Case(Layout(1, 2, 2, 1), "zbv", engine="zero1", model="dropless"),
    Case(Layout(2, 1, 2, 1), engine="zero2", model="nucleus"),
    Case(Layout(2, 2, 1, 1), "zbv", sequence=True, model="uneven"),
    Case(Layout(1, 4, 1, 1), engine="zero1", model="uneven"),
    Case(Layout(2, 2, 2, 1), "interleaved", sequence=True),
    Case(Layout(2, 2, 1, 1), "zbv", sequence=True, model="adaln_single"),
    Case(Layout(2, 2, 1, 1), "interleaved", True, "block", model="per_layer_embedders"),
]


def exhaustive(world_size: int) -> list[Case]:
    """Every layout with every schedule, sequence and recompute in float64; with every schedule under ZeRO."""
    layouts = layouts_of(world_size)
    exact = (Case(*values) for values in product(layouts, SCHEDULES, (False, True), RECOMPUTE))
    sharded = (
        Case(layout, schedule, engine=engine) for layout, schedule, engine in product(layouts, SCHEDULES, ENGINES)
    )
    return list(dict.fromkeys(case for case in (*exact, *sharded) if case.is_allowed))


def pairwise(axes: Mapping[str, Sequence[Hashable]], allowed: Callable[..., bool]) -> list[dict[str, Any]]:
    """Few combinations of one value of each axis, which hold every pair of values that any allowed combination holds.

    Greedy: for the first pair that is missing, the allowed combination that holds it and most others that are missing.

    >>> pairwise({"a": (0, 1), "b": (0, 1)}, lambda a, b: a or b)
    [{'a': 0, 'b': 1}, {'a': 1, 'b': 0}, {'a': 1, 'b': 1}]
    """
    # The longest axes first: their pairs need the most combinations, and the others ride along.
    names = sorted(axes, key=lambda name: -len(axes[name]))
    holders: dict[tuple, list[tuple]] = {}  # a pair -> the combinations that hold it
    for values in product(*(axes[name] for name in names)):
        if allowed(**dict(zip(names, values, strict=True))):
            for pair in _pairs(values):
                holders.setdefault(pair, []).append(values)
    missing, found = dict.fromkeys(sorted(holders, key=lambda pair: pair[:2])), []
    used: Counter = Counter()  # pairs that came seldom go first among equals, so that the combinations are diverse
    while missing:
        first = next(iter(missing))
        best = max(
            holders[first],
            key=lambda values: (
                sum(pair in missing for pair in _pairs(values)),
                -sum(used[pair] for pair in _pairs(values)),
            ),
        )
        found.append(dict(zip(names, best, strict=True)))
        used.update(_pairs(best))
        for pair in _pairs(best):
            missing.pop(pair, None)
    return [{name: values[name] for name in axes} for values in found]


def _pairs(values: Sequence[Hashable]) -> list[tuple]:
    """Every pair of a combination, with the axes that the two values belong to."""
    return [(i, j, values[i], values[j]) for i, j in combinations(range(len(values)), 2)]


def uneven() -> list[Case]:
    """Ranks with experts beside ranks without, over two and over four pipeline ranks."""
    layouts = (Layout(1, 2, 2, 1), Layout(1, 2, 1, 2), Layout(2, 2, 1, 1), Layout(1, 4, 1, 1), Layout(1, 4, 2, 1))
    cases = (Case(*values, model="uneven") for values in product(layouts, SCHEDULES, (False,), ("none",), ENGINES))
    # Seven layers do not fill four ranks twice.
    return [case for case in cases if case.is_allowed and (case.layout.pp == 2 or case.schedule == "1f1b")]


def covering(world_size: int) -> list[Case]:
    """Every layout with every value of every option, and every two options with one another."""
    axes: dict[str, Sequence[Hashable]] = {
        "layout": layouts_of(world_size),
        "schedule": SCHEDULES,
        # A tensor region without sequence parallelism is another thing than no tensor region: a value of its own.
        "sequence": ("no region", False, True),
        "recompute": RECOMPUTE,
        "engine": tuple(ENGINES),
        "model": tuple(MODELS),
    }

    def case(values: dict[str, Any]) -> Case:
        return Case(**values | {"sequence": values["sequence"] is True})

    def allowed(**values: Any) -> bool:
        return case(values).is_allowed and (values["sequence"] == "no region") == (values["layout"].tp == 1)

    return [case(values) for values in pairwise(axes, allowed)]
