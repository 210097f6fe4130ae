"""What is asked for, and scenes that show it: pure functions of an index.

Coordinates are fractions of the picture's side, from its upper left corner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product
from typing import Literal, NamedTuple, TypeVar, get_args

import torch

from megadit.data.config import Shape, Task
from megadit.runtime.seed import stream

Relation = Literal["left of", "right of", "above", "below"]
Split = Literal["train", "heldout"]

TASKS: tuple[Task, ...] = get_args(Task)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS = {
    "red": (226, 54, 54),
    "green": (52, 168, 83),
    "blue": (66, 103, 245),
    "yellow": (250, 210, 50),
    "purple": (170, 70, 215),
    "white": (240, 240, 240),
}
COUNTS = (2, 3, 4)

# Of a thing: half of its bounding box's side, about. As many things as are drawn together leave room for one another.
RADII = {1: (0.25, 0.33), 2: (0.19, 0.22), 3: (0.12, 0.15), 4: (0.12, 0.15)}
GAP = 0.03  # at least, between the circles around two things
CLEAR = 1.5  # of two things in a position: their distance along one axis, in distances along the other
# Things lie about these places: one in the middle, two side by side or one above the other, more in the quarters.
LOW, MIDDLE, HIGH = 0.25, 0.5, 0.75
QUARTERS = ((LOW, LOW), (HIGH, LOW), (LOW, HIGH), (HIGH, HIGH))
BESIDE = (((LOW, MIDDLE), (HIGH, MIDDLE)), ((MIDDLE, LOW), (MIDDLE, HIGH)))
# How far from them: in the direction of another thing or of the edge there is less room.
FREE, TIGHT = 0.06, 0.03

Choice = TypeVar("Choice")


class Asked(NamedTuple):
    """A thing as a caption names it; colour None: any."""

    shape: str
    colour: str | None = None


@dataclass(frozen=True)
class Request:
    """What a caption asks for: exactly these things and nothing else.

    count: how many of each thing, more than 1 in counting alone. relation: of the first thing to the second.
    """

    task: Task
    things: tuple[Asked, ...]
    count: int = 1
    relation: Relation | None = None


class Thing(NamedTuple):
    """A thing in a picture: its centre and half its side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """A request and a picture of it."""

    request: Request
    things: tuple[Thing, ...]


def relation_of(first: Thing, second: Thing) -> Relation:
    """How the first lies to the second, along the axis on which they are further apart.

    >>> relation_of(Thing("circle", "red", 0.2, 0.5, 0.1), Thing("square", "red", 0.8, 0.3, 0.1))
    'left of'
    """
    across, down = second.x - first.x, second.y - first.y
    if abs(across) >= abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


def is_clear(first: Thing, second: Thing) -> bool:
    """Whether nobody would argue about `relation_of` the two."""
    near, far = sorted((abs(second.x - first.x), abs(second.y - first.y)))
    return far >= CLEAR * near


# --- what training never shows ----------------------------------------------------------------------------------------
# Spread so that every shape, colour, count and relation is often seen otherwise.


def pair_is_heldout(shape: str, colour: str) -> bool:
    """A shape in a colour: each shape lacks one colour."""
    return (SHAPES.index(shape) + list(COLOURS).index(colour)) % 6 == 0


def company_is_heldout(first: str, second: str) -> bool:
    """Two shapes together: each shape lacks one other."""
    return abs(SHAPES.index(first) - SHAPES.index(second)) == 3


def count_is_heldout(shape: str, count: int) -> bool:
    """So many of a shape: each shape lacks one count."""
    return count in COUNTS and COUNTS.index(count) == SHAPES.index(shape) % 3


def relation_is_heldout(first: str, relation: Relation, second: str) -> bool:
    """One shape above another: 7 of the 15 pairs lack one of the two orders."""
    if relation == "below":
        first, relation, second = second, "above", first
    return relation == "above" and SHAPES.index(second) - SHAPES.index(first) in (1, 4)


def colouring_is_heldout(first: Asked | Thing, second: Asked | Thing) -> bool:
    """Two shapes in two colours."""
    assert first.colour is not None and second.colour is not None
    names = list(COLOURS)
    marks = [SHAPES.index(thing.shape) + 2 * names.index(thing.colour) for thing in (first, second)]  # type: ignore[arg-type]
    return first.colour != second.colour and sum(marks) % 6 == 1


def shows_heldout(things: Sequence[Thing]) -> bool:
    """Whether a picture shows anything that training never does."""
    shapes = {thing.shape for thing in things}
    if any(pair_is_heldout(thing.shape, thing.colour) for thing in things):
        return True
    if len(shapes) == 1:
        return count_is_heldout(things[0].shape, len(things))
    first, second = things
    return (
        company_is_heldout(first.shape, second.shape)
        or relation_is_heldout(first.shape, relation_of(first, second), second.shape)
        or colouring_is_heldout(first, second)
    )


def is_heldout(request: Request) -> bool:
    """Whether a request names a combination that training never shows."""
    first, *others = request.things
    if any(thing.colour is not None and pair_is_heldout(thing.shape, thing.colour) for thing in request.things):
        return True
    if not others:
        return count_is_heldout(first.shape, request.count)
    (second,) = others
    if company_is_heldout(first.shape, second.shape):
        return True
    if request.relation is not None:
        return relation_is_heldout(first.shape, request.relation, second.shape)
    return first.colour is not None and colouring_is_heldout(first, second)


# --- requests ---------------------------------------------------------------------------------------------------------


def requests_of(task: Task) -> Iterator[Request]:
    """Every request of a task, held out or not."""
    coloured = [Asked(shape, colour) for shape, colour in product(SHAPES, COLOURS)]
    if task == "single_object":
        yield from (Request(task, (Asked(shape),)) for shape in SHAPES)
    elif task == "two_object":
        yield from (Request(task, (Asked(a), Asked(b))) for a, b in permutations(SHAPES, 2))
    elif task == "counting":
        yield from (Request(task, (Asked(shape),), count) for shape, count in product(SHAPES, COUNTS))
    elif task == "colors":
        yield from (Request(task, (thing,)) for thing in coloured)
    elif task == "position":
        pairs = product(permutations(SHAPES, 2), RELATIONS)
        yield from (Request(task, (Asked(a), Asked(b)), relation=relation) for (a, b), relation in pairs)
    else:
        yield from (
            Request(task, (a, b)) for a, b in permutations(coloured, 2) if a.shape != b.shape and a.colour != b.colour
        )


class Dice:
    """Random choices from one stream."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._left: list[float] = []

    def uniform(self) -> float:
        """At least 0, less than 1."""
        if not self._left:
            self._left = torch.rand(64, generator=self._generator, dtype=torch.float64).tolist()
        return self._left.pop()

    def between(self, least: float, most: float) -> float:
        return least + (most - least) * self.uniform()

    def choice(self, among: Sequence[Choice]) -> Choice:
        return among[int(self.uniform() * len(among))]


REQUESTS = {task: tuple(requests_of(task)) for task in TASKS}
TRAINED = {task: tuple(request for request in REQUESTS[task] if not is_heldout(request)) for task in TASKS}
HELDOUT = {task: tuple(request for request in REQUESTS[task] if is_heldout(request)) for task in TASKS}


@cache
def requests_with(split: Split, task: Task, shapes: tuple[str, ...] = SHAPES) -> tuple[Request, ...]:
    """A task's requests of these shapes alone: those that training shows, or those that it never does."""
    requests = (TRAINED if split == "train" else HELDOUT)[task]
    return tuple(request for request in requests if {thing.shape for thing in request.things} <= {*shapes})


def picture_of(request: Request, dice: Dice) -> tuple[Thing, ...]:
    """A picture of a request, its colours, sizes and places drawn where it does not say: apart, and none cut off."""
    asked = [thing for thing in request.things for _ in range(request.count)]
    least, most = RADII[len(asked)]

    def near(place: float) -> float:
        spread = FREE if place == MIDDLE else TIGHT
        return dice.between(place - spread, place + spread)

    while True:
        things = tuple(
            Thing(
                thing.shape,
                thing.colour or dice.choice(tuple(COLOURS)),
                near(x),
                near(y),
                dice.between(least, most),
            )
            for thing, (x, y) in zip(asked, places(len(asked), dice), strict=True)
        )
        if not all(is_whole(thing) for thing in things) or not all(are_apart(a, b) for a, b in combinations(things, 2)):
            continue
        if request.relation is None or (is_clear(*things) and relation_of(*things) == request.relation):
            return things


def places(count: int, dice: Dice) -> list[tuple[float, float]]:
    """About where so many things lie, in a random order."""
    if count == 1:
        return [(MIDDLE, MIDDLE)]
    left = list(dice.choice(BESIDE) if count == 2 else QUARTERS)
    return [left.pop(int(dice.uniform() * len(left))) for _ in range(count)]


def is_whole(thing: Thing) -> bool:
    """Whether the picture has all of it, and a little room around it."""
    return min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) > thing.radius + GAP / 2


def are_apart(first: Thing, second: Thing) -> bool:
    """Whether there is a gap between the circles around two things, which reach as far as a diamond's corners."""
    distance = ((first.x - second.x) ** 2 + (first.y - second.y) ** 2) ** 0.5
    return distance >= 1.1 * (first.radius + second.radius) + GAP


def scene(split: Split, index: int, tasks: Sequence[Task] = TASKS, shapes: tuple[str, ...] = SHAPES) -> Scene:
    """Scene `index` of a split without end; tasks take turns. Neither split shows what is held out of training."""
    dice = Dice(stream(0, "shapes", split, index))
    request = dice.choice(requests_with("train", tasks[index % len(tasks)], shapes))
    while True:
        things = picture_of(request, dice)
        if not shows_heldout(things):
            return Scene(request, things)
