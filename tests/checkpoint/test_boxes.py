import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadit.checkpoint.boxes import flat_range_boxes


@given(st.lists(st.integers(0, 4), max_size=4).map(tuple), st.data())
def test_boxes_list_the_elements_of_the_range_in_order(shape, data):
    whole = math.prod(shape)
    start = data.draw(st.integers(0, whole))
    numel = data.draw(st.integers(0, whole - start))
    boxes = flat_range_boxes(shape, start, numel)

    every_index = list(itertools.product(*map(range, shape)))  # in row-major order
    listed = []
    for box, begin in boxes:
        assert begin == len(listed)
        ranges = [range(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True)]
        listed += itertools.product(*ranges)
    assert listed == every_index[start : start + numel]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize(("start", "numel"), [(-1, 2), (0, -1), (5, 2)])
def test_a_range_outside_the_tensor_is_refused(start, numel):
    with pytest.raises(ValueError, match=r"outside a tensor of shape \(2, 3\)"):
        flat_range_boxes((2, 3), start, numel)
