"""Scenes as pixels: flat colours with smooth edges on a dark ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from megadit.data.shapes.scene import COLOURS, Thing

GROUND = (24, 24, 28)
FINE = 4  # samples along a pixel's side

# Whether a point is inside a shape that is centred on 0 and reaches about 1.
INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.88,
    "triangle": lambda x, y: (y <= 0.75) & (y >= 1.75 * abs(x) - 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.3),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1.1,
}
REACH = 1.1  # of the farthest point of any along x or y


@cache
def moments(shape: str) -> tuple[float, float]:
    """(area, height of the centre of mass below the centre) of a shape that reaches about 1."""
    line = REACH * (np.arange(-550, 550) + 0.5) / 550
    inside = INSIDE[shape](line[None, :], line[:, None])
    rows = inside.sum(axis=1)
    return float(inside.mean() * (2 * REACH) ** 2), float((rows * line).sum() / rows.sum())


def coverage(shape: str, x: float, y: float, radius: float, rows: range, columns: range) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1, [rows, columns]; centre and radius in pixels."""
    offsets = (np.arange(FINE) + 0.5) / FINE
    down = (np.arange(rows.start, rows.stop)[:, None] + offsets).reshape(-1, 1)
    across = (np.arange(columns.start, columns.stop)[:, None] + offsets).reshape(1, -1)
    inside = INSIDE[shape]((across - x) / radius, (down - y) / radius)
    return inside.reshape(len(rows), FINE, len(columns), FINE).mean(axis=(1, 3))


def around(centre: float, reach: float, size: int) -> range:
    """The pixels of a row or column that are within reach."""
    return range(max(0, int(centre - reach) - 1), min(size, int(centre + reach) + 2))


def draw(things: Sequence[Thing], size: int) -> np.ndarray:
    """uint8 [size, size, 3]."""
    picture = np.empty((size, size, 3))
    picture[:] = GROUND
    for thing in things:
        x, y, radius = thing.x * size, thing.y * size, thing.radius * size
        rows, columns = around(y, REACH * radius, size), around(x, REACH * radius, size)
        covered = coverage(thing.shape, x, y, radius, rows, columns)[:, :, None]
        part = picture[rows.start : rows.stop, columns.start : columns.stop]
        part += covered * (np.array(COLOURS[thing.colour]) - part)
    return picture.round().astype(np.uint8)
