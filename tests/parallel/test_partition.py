"""Layers to stages: the best of all ways to cut."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadit.parallel.pipeline.partition import partition

layers_and_stages = st.lists(st.integers(0, 20), min_size=1, max_size=8).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
)


@given(layers_and_stages)
def test_the_dearest_stage_is_as_cheap_as_in_the_best_of_all_cuts(case):
    costs, num_stages = case

    def dearest(bounds):
        return max(sum(costs[begin:end]) for begin, end in pairwise(bounds))

    stages = partition(costs, num_stages)
    assert len(stages) == num_stages
    assert all(len(stage) > 0 and stage.step == 1 for stage in stages)
    assert [layer for stage in stages for layer in stage] == list(range(len(costs)))
    every_cut = combinations(range(1, len(costs)), num_stages - 1)
    best = min(dearest((0, *cut, len(costs))) for cut in every_cut)
    assert max(sum(costs[layer] for layer in stage) for stage in stages) == best


@pytest.mark.parametrize(("costs", "num_stages"), [([], 1), ([1.0], 2), ([1.0] * 3, 4)])
def test_too_few_layers_are_refused(costs, num_stages):
    message = f"{len(costs)} layers cannot fill {num_stages} pipeline stages; lower parallel.pipeline"
    with pytest.raises(ValueError, match=message):
        partition(costs, num_stages)
