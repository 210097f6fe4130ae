"""Every picture is drawn once, by ranks whose calls of the network are as many and as large."""

from hypothesis import given
from hypothesis import strategies as st

from megadit.sampling.share import rounds_of

counts, groups, ranks, batches = st.integers(0, 200), st.integers(1, 8), st.integers(1, 9), st.integers(1, 40)
plans = st.tuples(counts, groups, ranks, batches)


@given(plans)
def test_every_picture_is_kept_once_and_in_order(plan):
    count, _, num_ranks, _ = plan
    rounds = rounds_of(*plan)
    kept = [index for each in rounds for rank in range(num_ranks) for index in each.kept(rank)]
    assert kept == list(range(count))
    assert [index for each in rounds for index in each.pictures] == kept


@given(plans)
def test_all_ranks_draw_whole_groups_and_as_many(plan):
    _, group, num_ranks, batch = plan
    for each in rounds_of(*plan):
        for rank in range(num_ranks):
            drawn, kept = each.drawn(rank), each.kept(rank)
            assert len(drawn) == each.size and each.size % group == 0 and drawn.start % group == 0
            assert group <= each.size <= max(batch, group)
            assert list(kept) == list(drawn)[: len(kept)], "what is kept comes first"


@given(plans)
def test_there_are_no_more_calls_and_no_larger_ones_than_are_needed(plan):
    count, group, num_ranks, batch = plan
    rounds = rounds_of(*plan)
    num_groups, largest = -(-count // group), max(1, batch // group)
    assert len(rounds) == -(-num_groups // (largest * num_ranks))
    assert all(each.size == largest * group for each in rounds[:-1])
    # Less than a group for each rank is filling, beside the last group's.
    filling = sum(each.size * num_ranks for each in rounds) - num_groups * group
    assert filling < num_ranks * group
