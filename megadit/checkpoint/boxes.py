"""A flat range of a row-major tensor as a few boxes.

ZeRO cuts parameters into flat ranges; a checkpoint of logical tensors is cut into boxes. This is the bridge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A hyper-rectangle of a tensor: where it begins and how far it extends, along each dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def flat_range_boxes(shape: tuple[int, ...], start: int, numel: int) -> list[tuple[Box, int]]:
    """Cut the flat range [start, start + numel) of a row-major tensor of `shape` into boxes.

    Returns (box, its start inside the range) in flat order, at most 2 * ndim - 1 of them (one for a 0-dim tensor, none
    for an empty range); each box is one contiguous stretch of the range. Raises ValueError for a range outside the
    tensor.

    >>> for box, begin in flat_range_boxes((3, 4), start=2, numel=7):
    ...     print(box.offsets, box.sizes, begin)
    (0, 2) (1, 2) 0
    (1, 0) (1, 4) 2
    (2, 0) (1, 1) 6
    >>> flat_range_boxes((), start=0, numel=1)
    [(Box(offsets=(), sizes=()), 0)]
    """
    if start < 0 or numel < 0 or start + numel > math.prod(shape):
        raise ValueError(f"the range [{start}, {start + numel}) is outside a tensor of shape {shape}")
    if numel == 0:
        return []
    if len(shape) <= 1:
        return [(Box((start,), (numel,)) if shape else Box((), ()), 0)]

    # The whole rows in the middle are one box; what is left of the first and of the last row is the same task, one
    # dimension lower.
    row = math.prod(shape[1:])
    stop = start + numel
    first_whole, end_whole = -(-start // row), stop // row
    if first_whole > end_whole:  # begins and ends inside one row
        return _inside_row(shape, end_whole, start, stop, start)
    boxes = _inside_row(shape, first_whole - 1, start, first_whole * row, start)
    if first_whole < end_whole:
        box = Box((first_whole,) + (0,) * (len(shape) - 1), (end_whole - first_whole, *shape[1:]))
        boxes.append((box, first_whole * row - start))
    return boxes + _inside_row(shape, end_whole, end_whole * row, stop, start)


def _inside_row(shape: tuple[int, ...], index: int, begin: int, end: int, start: int) -> list[tuple[Box, int]]:
    """The boxes of [begin, end), which lies in row `index`, of a range that starts at `start`."""
    inner = flat_range_boxes(shape[1:], begin - index * math.prod(shape[1:]), end - begin) if begin < end else []
    return [(Box((index, *box.offsets), (1, *box.sizes)), begin - start + inside) for box, inside in inner]
