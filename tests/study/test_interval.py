"""Intervals, against torch-free arithmetic and against chance itself."""

import numpy as np
import pytest

from megadit.study.interval import Interval, compared, interval


def test_three_repeats_by_hand():
    # t of 2 degrees of freedom at 97.5 % is 4.302653 (any table).
    mean, low, high = interval([0.7, 0.8, 0.75])
    half = 4.302653 * 0.05 / 3**0.5
    assert (mean, low, high) == pytest.approx((0.75, 0.75 - half, 0.75 + half))


def test_equal_repeats_have_no_width_and_one_has_no_end():
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert interval([0.5]) == (0.5, -np.inf, np.inf)


def test_nineteen_in_twenty_hold_the_truth():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 3))
    holds = [found.low <= 3.0 <= found.high for found in map(interval, draws)]
    assert 0.94 < np.mean(holds) < 0.96


@pytest.mark.parametrize(
    ("one", "other", "larger", "smaller"),
    [
        ((0.9, 0.85, 0.95), (0.7, 0.6, 0.8), "better", "worse"),
        ((0.7, 0.6, 0.8), (0.9, 0.85, 0.95), "worse", "better"),
        ((0.9, 0.8, 1.0), (0.7, 0.6, 0.8), "inconclusive", "inconclusive"),
        ((0.7, 0.1, 1.3), (0.7, 0.69, 0.71), "inconclusive", "inconclusive"),
    ],
)
def test_only_intervals_that_do_not_overlap_conclude(one, other, larger, smaller):
    assert compared(Interval(*one), Interval(*other), larger_is_better=True) == larger
    assert compared(Interval(*one), Interval(*other), larger_is_better=False) == smaller
