"""Curves made small: whatever is left out, extremes, gaps and what is not finite stay."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.history.curve import Curve, Loads, thin

VALUES = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 10_000), VALUES, max_size=200), st.integers(1, 50))
def test_columns_hold_all_values(values, columns):
    steps = sorted(values)
    curve = Curve.of(steps, [values[step] for step in steps])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thinned = thin(curve, columns)
    assert len(thinned.steps) == len(thinned.low) == len(thinned.high) <= columns
    assert np.all(np.diff(thinned.steps) > 0)
    finite = [value for value in values.values() if abs(value) <= 1e100]
    if finite:
        assert np.nanmin(thinned.low) == min(finite) and np.nanmax(thinned.high) == max(finite)
    has = np.isfinite(thinned.middle)
    assert np.all((thinned.low <= thinned.middle)[has] & (thinned.middle <= thinned.high)[has])
    assert sum(count for _, count, _ in thinned.bad) == len(values) - len(finite)
    assert sum(piece.stop - piece.start for piece in thinned.pieces()) == has.sum()


def test_a_column_is_the_median_of_its_steps():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000)
    thinned = thin(Curve.of(np.arange(1, 1001), values), 100)
    np.testing.assert_allclose(thinned.middle, np.median(values.reshape(100, 10), axis=1))
    np.testing.assert_array_equal(thinned.low, values.reshape(100, 10).min(axis=1))
    np.testing.assert_allclose(thinned.steps, np.arange(5.5, 1000, 10))


def test_few_values_stay_as_they_are():
    thinned = thin(Curve.of([3, 7, 500], [1.0, math.nan, 2.0]), 3)
    assert thinned.steps.tolist() == [3, 7, 500]
    assert (thinned.low[[0, 2]] == thinned.high[[0, 2]]).all()
    (bad,) = thinned.bad
    assert bad[:2] == (7, 1) and math.isnan(bad[2])
    assert [(piece.start, piece.stop) for piece in thinned.pieces()] == [(0, 1), (2, 3)]


def test_of_a_step_that_was_made_again_the_later_value_holds():
    curve = Curve.of([1, 2, 3, 2, 3, 4], [1.0, 2.0, 3.0, 20.0, 30.0, 40.0])
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1, 2, 3, 4], [1.0, 20.0, 30.0, 40.0])


def test_medians_pass_over_what_is_not_finite():
    curve = Curve.of(range(5), [9.0, 1.0, math.nan, 3.0, 5.0])
    assert (curve.recent(3), curve.median()) == (3.0, 4.0)
    assert math.isnan(Curve.of([], []).median())


@pytest.mark.parametrize("columns", [1, 7, 1000])
def test_loads_are_means_over_stretches(columns):
    loads, rows = Loads(2), np.random.default_rng(0).uniform(size=(1000, 2))
    for step, row in enumerate(rows):
        loads.add(step, row.tolist())
    found = loads.means(columns)
    assert len(found) <= min(columns, Loads.BOUND)
    for begin, end, means in found:
        np.testing.assert_allclose(means, rows[begin:end].mean(axis=0))
    assert [end for _, end, _ in found[:-1]] == [begin for begin, _, _ in found[1:]]


def test_loads_pass_over_what_is_not_finite_and_other_numbers_of_experts():
    loads = Loads(2)
    for row in ([1.0, math.nan], [3.0, math.inf], [1.0, 2.0, 3.0]):
        loads.add(0, row)
    ((begin, end, means),) = loads.means(10)
    assert (begin, end, means[0]) == (0, 1, 2.0) and math.isnan(means[1])
