"""Means with confidence intervals, and what may be concluded from two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t over repeats, such as the seeds of a training; of one repeat the bounds are infinite.

    >>> round(interval([1.0, 2.0, 3.0]).high, 3)  # 2 + 4.303 x 1 / sqrt(3)
    4.484
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, -np.inf, np.inf)
    from scipy import stats  # it takes a second

    half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def compared(one: Interval, other: Interval, larger_is_better: bool) -> str:
    """ "better", "worse", or, where the intervals overlap, "inconclusive": what `one` is beside the other.

    >>> compared(Interval(0.9, 0.8, 1.0), Interval(0.5, 0.4, 0.6), larger_is_better=True)
    'better'
    >>> compared(Interval(0.9, 0.8, 1.0), Interval(0.85, 0.7, 1.0), larger_is_better=True)
    'inconclusive'
    """
    if one.low <= other.high and other.low <= one.high:
        return "inconclusive"
    return "better" if (one.mean > other.mean) == larger_is_better else "worse"
