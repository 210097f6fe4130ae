"""Pictures that are wrong in a known way."""

from collections.abc import Callable
from itertools import combinations

import numpy as np

from megadit.data.shapes.drawing import GROUND, draw
from megadit.data.shapes.scene import (
    COLOURS,
    GAP,
    RADII,
    RELATIONS,
    SHAPES,
    Dice,
    Request,
    Thing,
    are_apart,
    picture_of,
)

Picture = np.ndarray


def other(dice: Dice, among, than):
    return dice.choice([one for one in among if one != than])


def changed(things, place: int, **values) -> tuple[Thing, ...]:
    return tuple(thing._replace(**values) if i == place else thing for i, thing in enumerate(things))


def missing(request: Request, dice: Dice, size: int) -> Picture:
    """One thing less; of one thing nothing is left."""
    things = list(picture_of(request, dice))
    things.remove(dice.choice(things))
    return draw(things, size)


def extra(request: Request, dice: Dice, size: int) -> Picture:
    """One thing more, of any kind, and smaller where there is little room."""
    while True:
        things = picture_of(request, dice)
        for _ in range(50):
            half = RADII[4][0]
            place = [dice.between(half + GAP, 1 - half - GAP) for _ in range(2)]
            thing = Thing(dice.choice(SHAPES), dice.choice(tuple(COLOURS)), *place, half)
            if all(are_apart(a, b) for a, b in combinations([*things, thing], 2)):
                return draw([*things, thing], size)


def another_shape(request: Request, dice: Dice, size: int) -> Picture:
    """A thing is of a shape that nobody asked for."""
    things = picture_of(request, dice)
    place = int(dice.uniform() * len(things))
    asked = {thing.shape for thing in request.things}
    return draw(changed(things, place, shape=dice.choice([s for s in SHAPES if s not in asked])), size)


def another_colour(request: Request, dice: Dice, size: int) -> Picture:
    """A thing is of a colour that nobody asked for."""
    things = picture_of(request, dice)
    place = int(dice.uniform() * len(things))
    asked = {thing.colour for thing in request.things}
    return draw(changed(things, place, colour=dice.choice([c for c in COLOURS if c not in asked])), size)


def swapped(request: Request, dice: Dice, size: int) -> Picture:
    """Each of the two has the other's colour."""
    first, second = picture_of(request, dice)
    return draw([first._replace(colour=second.colour), second._replace(colour=first.colour)], size)


def elsewhere(request: Request, dice: Dice, size: int) -> Picture:
    """The first is on another side of the second."""
    relation = other(dice, RELATIONS, request.relation)
    return draw(picture_of(Request("position", request.things, relation=relation), dice), size)


def twice(request: Request, dice: Dice, size: int) -> Picture:
    """Two of the first thing, and none of the second."""
    first = request.things[0]
    things = picture_of(Request(request.task, (first, first), relation=request.relation), dice)
    return draw(things, size)


def halved(request: Request, dice: Dice, size: int) -> Picture:
    """A thing whose upper, lower, left or right half is not there."""
    things = picture_of(request, dice)
    whole = dice.choice(things)
    picture = draw(things, size)
    x, y, half = (round(value * size) for value in (whole.x, whole.y, 1.2 * whole.radius))
    rows, columns = slice(max(0, y - half), y + half + 1), slice(max(0, x - half), x + half + 1)
    cuts = [(slice(rows.start, y), columns), (rows, slice(columns.start, x)), (rows, slice(x, columns.stop))]
    if whole.shape != "triangle":  # whose upper half is a triangle
        cuts.append((slice(y, rows.stop), columns))
    picture[dice.choice(cuts)] = GROUND
    return picture


Mistake = Callable[[Request, Dice, int], Picture]
OF_ANY: tuple[Mistake, ...] = (missing, extra, another_shape, halved)
MISTAKES: dict[str, tuple[Mistake, ...]] = {
    "single_object": OF_ANY,
    "two_object": (*OF_ANY, twice),
    "counting": OF_ANY,
    "colors": (*OF_ANY, another_colour),
    "position": (*OF_ANY, elsewhere, elsewhere, twice),
    "color_attr": (*OF_ANY, another_colour, swapped, twice),
}
