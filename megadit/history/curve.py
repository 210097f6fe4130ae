"""Curves of many steps, made as small as a screen without losing what stands out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LARGEST = 1e100  # what is beyond counts as not finite: no scale has room for it


@dataclass(frozen=True)
class Curve:
    """Values by step, in order of the steps."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, steps: ArrayLike, values: ArrayLike) -> Curve:
        """Of a step that comes twice, the later value holds: the run went back and made it again."""
        steps, values = np.asarray(steps, np.int64), np.asarray(values, np.float64)
        if len(steps) and np.any(np.diff(steps) <= 0):
            steps, places = np.unique(steps[::-1], return_index=True)
            values = values[::-1][places]
        return cls(steps, values)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        return np.abs(self.values) <= LARGEST

    @property
    def finite(self) -> NDArray[np.float64]:
        """The values that can be drawn."""
        return self.values[self.is_finite]

    def recent(self, count: int = 100) -> float:
        """The median of the last values; NaN where there are none."""
        values = self.finite[-count:]
        return float(np.median(values)) if len(values) else float("nan")

    def median(self) -> float:
        """The median of all values; NaN where there are none."""
        return self.recent(len(self))


@dataclass(frozen=True)
class Thinned:
    """A curve in columns of steps: least, median and greatest of each column's finite values.

    steps: the middle of a column's steps. A column without a finite value is NaN.
    bad: (first step, how many, the first of the values) of what is not finite in a column.
    """

    steps: NDArray[np.float64]
    low: NDArray[np.float64]
    middle: NDArray[np.float64]
    high: NDArray[np.float64]
    bad: tuple[tuple[int, int, float], ...]

    def pieces(self) -> Iterator[slice]:
        """The stretches of columns between those that have no finite value."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], np.isfinite(self.middle), [False]]).astype(np.int8)))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            yield slice(begin, end)


def thin(curve: Curve, columns: int) -> Thinned:
    """At most `columns` columns of equally many steps; as many as there are values where those are fewer."""
    if len(curve) <= columns:
        begins = np.arange(len(curve))
    else:
        first, last = int(curve.steps[0]), int(curve.steps[-1])
        column = (curve.steps - first) * columns // (last - first + 1)
        begins = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(begins[1:], len(curve))
    place = np.repeat(np.arange(len(begins)), ends - begins)
    finite = curve.is_finite
    middle_steps = (curve.steps[begins] + curve.steps[ends - 1]) / 2 if len(curve) else np.empty(0)
    # Sorted by column and value: least, median and greatest of each column are at known places.
    place, values = place[finite], curve.values[finite]
    order = np.lexsort((values, place))
    values, counts = values[order], np.bincount(place, minlength=len(begins))
    starts, has = np.cumsum(counts) - counts, counts > 0
    low, middle, high = np.full((3, len(begins)), np.nan)
    at, length = starts[has], counts[has]
    low[has], high[has] = values[at], values[at + length - 1]
    middle[has] = (values[at + (length - 1) // 2] + values[at + length // 2]) / 2
    return Thinned(middle_steps, low, middle, high, tuple(_bad(curve, begins, ends)))


def _bad(curve: Curve, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[tuple[int, int, float]]:
    places = np.flatnonzero(~curve.is_finite)
    columns = np.searchsorted(ends, places, side="right")
    for column in np.unique(columns):
        here = places[columns == column]
        yield int(curve.steps[here[0]]), len(here), float(curve.values[here[0]])


class Loads:
    """What each expert of a layer took, as means over equal stretches of steps, whose number stays below a bound."""

    BOUND = 256

    def __init__(self, experts: int) -> None:
        self.experts, self.width = experts, 1
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._counts: dict[int, NDArray[np.int64]] = {}

    def add(self, step: int, load: Sequence[float]) -> None:
        """The loads of one step; another number of experts than before is not counted, nor what is not finite."""
        if len(load) != self.experts:
            return
        values = np.array(load)
        finite = np.abs(values) <= LARGEST
        self._put(step // self.width, np.where(finite, values, 0.0), finite.astype(np.int64))
        self._merge(self.BOUND)

    def _merge(self, bound: int) -> None:
        """Make stretches twice as wide until there are at most `bound`."""
        while len(self._sums) > bound:
            self.width *= 2
            sums, counts = self._sums, self._counts
            self._sums, self._counts = {}, {}
            for place in sums:
                self._put(place // 2, sums[place], counts[place])

    def _put(self, place: int, values: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        if place in self._sums:
            self._sums[place] = self._sums[place] + values
            self._counts[place] = self._counts[place] + counts
        else:
            self._sums[place], self._counts[place] = values, counts

    def means(self, columns: int) -> list[tuple[int, int, NDArray[np.float64]]]:
        """(first step, step behind the last, mean load of each expert) of at most `columns` stretches; NaN: none."""
        merged = Loads(self.experts)
        merged.width, merged._sums, merged._counts = self.width, dict(self._sums), dict(self._counts)
        merged._merge(columns)
        found = []
        for place, sums in sorted(merged._sums.items()):
            counts = merged._counts[place]
            means = np.where(counts > 0, sums, np.nan) / np.maximum(counts, 1)
            found.append((place * merged.width, (place + 1) * merged.width, means))
        return found
