"""Scales and ticks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.page.axes import log_ticks, ticks


@settings(deadline=None)
@given(st.floats(1e-6, 1e15))
def test_ticks_are_round_and_in_range(high):
    found = ticks(high)
    assert found[0] == 0 and 3 <= len(found) <= 8
    assert found[-1] <= high * (1 + 1e-6) < found[-1] + 1.001 * found[1]
    assert f"{found[1]:.1e}"[0] in "125"


@settings(deadline=None)
@given(st.floats(1e-6, 1e12), st.floats(1.3, 1e4))
def test_logarithmic_ticks(low, ratio):
    found = log_ticks(low, low * ratio)
    assert all(low <= value <= low * ratio for value in found)
    assert len(found) >= 3 * int(len(f"{int(ratio)}") - 1)  # of every whole power of ten
