"""Reads scenes off pixels, and says whether a picture shows what was asked for.

1. What differs from the ground is a blob; connected pixels are one. Specks are passed over.
2. A blob's colour is that of the pixels which stand out most, by the nearest of the palette.
3. With it, each pixel's share that the blob covers is known. Centre of mass and area place every shape over the blob;
   the one whose coverage differs least is what it shows, unless even that one differs too much, or in width or height.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from megadit.data.shapes.drawing import GROUND, INSIDE, coverage, moments
from megadit.data.shapes.scene import COLOURS, Asked, Request, Thing, relation_of

STANDS_OUT = 48.0  # of 255: a pixel that differs so much from the ground is part of a blob
SPECK = 0.003  # of the picture's area: less is no thing
FARTHEST_COLOUR = 70.0  # a blob this far from every colour of the palette has none of them
WORST_FIT = 0.2  # of the areas of blob and shape together: what may lie in one of them alone
WORST_SIDE = 0.25  # of its side: how much wider or narrower, higher or lower than the shape a blob may be

UNKNOWN = "unknown"
PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)


class Verdict(NamedTuple):
    """Whether the picture is right; if not, why."""

    right: bool
    why: str = ""


def read(picture: np.ndarray) -> list[Thing]:
    """The things in a uint8 [size, size, 3] picture; shape or colour "unknown" where nothing fits."""
    pixels = picture.astype(np.float64)
    difference = np.linalg.norm(pixels - GROUND, axis=2)
    labels, _ = ndimage.label(difference > STANDS_OUT, structure=np.ones((3, 3)))
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if (labels[box] == number).sum() < SPECK * difference.size:
            continue
        # The edge of a blob is fainter than what makes it one.
        rows, columns = (range(max(0, s.start - 2), min(len(pixels), s.stop + 2)) for s in box)
        part = np.s_[rows.start : rows.stop, columns.start : columns.stop]
        others = (labels[part] != number) & (labels[part] != 0)
        found.append(read_blob(np.where(others[:, :, None], GROUND, pixels[part]), rows, columns, len(pixels)))
    return found


def read_blob(pixels: np.ndarray, rows: range, columns: range, size: int) -> Thing:
    """What the pixels in these rows and columns show."""
    difference = np.linalg.norm(pixels - GROUND, axis=2)
    core = pixels[difference >= np.quantile(difference[difference > STANDS_OUT], 0.5)]
    colour = np.median(core, axis=0)
    distances = np.linalg.norm(PALETTE - colour, axis=1)
    name = list(COLOURS)[distances.argmin()] if distances.min() <= FARTHEST_COLOUR else UNKNOWN
    axis = colour - GROUND
    covered = ((pixels - GROUND) @ axis / (axis @ axis)).clip(0, 1)
    area = covered.sum()
    x = (covered.sum(axis=0) * (np.arange(columns.start, columns.stop) + 0.5)).sum() / area
    y = (covered.sum(axis=1) * (np.arange(rows.start, rows.stop) + 0.5)).sum() / area
    misfits, radii, centres, covers = {}, {}, {}, {}
    for shape in INSIDE:
        unit_area, below = moments(shape)
        radii[shape] = (area / unit_area) ** 0.5
        centres[shape] = y - below * radii[shape]
        covers[shape] = coverage(shape, x, centres[shape], radii[shape], rows, columns)
        misfits[shape] = abs(covered - covers[shape]).sum() / (covered + covers[shape]).sum()
    best = min(misfits, key=lambda shape: misfits[shape])
    shape = best if misfits[best] <= WORST_FIT and have_like_sides(covered, covers[best]) else UNKNOWN
    return Thing(shape, name, x / size, centres[best] / size, radii[best] / size)


def have_like_sides(covered: np.ndarray, placed: np.ndarray) -> bool:
    """Whether a blob is about as wide and as high as a shape; a pixel more or less is nothing."""
    for axis in (0, 1):
        blob, shape = ((each.max(axis=axis) > 0.5).sum() for each in (covered, placed))
        if abs(int(blob) - int(shape)) > max(1.0, WORST_SIDE * shape):
            return False
    return True


def fits(asked: Asked, thing: Thing) -> bool:
    """Whether a thing is one that was asked for."""
    return thing.shape == asked.shape and (asked.colour is None or thing.colour == asked.colour)


def judge(picture: np.ndarray, request: Request) -> Verdict:
    """Whether a uint8 [size, size, 3] picture shows exactly what was asked for."""
    return judge_things(read(picture), request)


def judge_things(things: Sequence[Thing], request: Request) -> Verdict:
    """Whether these things are exactly what was asked for."""
    wanted = [asked for asked in request.things for _ in range(request.count)]
    if len(things) != len(wanted):
        return Verdict(False, f"{len(things)} things in place of {len(wanted)}")
    unknown = [thing for thing in things if thing.shape == UNKNOWN]
    if unknown:
        return Verdict(False, f"{len(unknown)} of the things are of no shape")
    # Each order of the things is tried: that of the request is the one that counts for positions.
    matches = [
        order
        for order in permutations(things)
        if all(fits(asked, thing) for asked, thing in zip(wanted, order, strict=True))
    ]
    if not matches:
        return Verdict(False, f"shows {told(things)}")
    if request.relation is None:
        return Verdict(True)
    shown = relation_of(*matches[0])
    return Verdict(True) if shown == request.relation else Verdict(False, f"the first is {shown} the second")


def told(things: Sequence[Thing]) -> str:
    """Things in words, the same ones together."""
    counts = Counter(f"{thing.colour} {thing.shape}" for thing in things)
    return ", ".join(f"{count} x {what}" if count > 1 else what for what, count in counts.items())
