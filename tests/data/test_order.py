"""Permutations that are permutations, and an order of steps that is fair, complete and a function of the step alone."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from megadit.data.order import Order, Share, interleaved, permute, round_keys, shares

SEEDS = st.integers(-(2**63), 2**64)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 400))
def test_a_permutation_has_every_place_once(seed, size):
    assert sorted(permute(np.arange(size), size, round_keys(seed, "x")).tolist()) == list(range(size))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 2**40), places=st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_a_place_is_computed_by_itself_and_stays_within(seed, size, places):
    places = np.array(sorted({place % size for place in places}))
    keys = round_keys(seed, "x")
    found = permute(places, size, keys)
    assert (found < size).all() and len(set(found.tolist())) == len(places)
    assert [permute(places[i : i + 1], size, keys)[0] for i in range(len(places))] == found.tolist()


def test_names_and_seeds_have_permutations_of_their_own():
    keys = [round_keys(*names) for names in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"))]
    assert len({tuple(permute(np.arange(50), 50, key).tolist()) for key in keys}) == 5


@pytest.mark.parametrize("size", [2, 5, 12, 37])
def test_every_number_is_as_often_at_every_place_as_any_other(size):
    counts, pairs, draws = np.zeros((size, size)), np.zeros(size), 1000
    for seed in range(draws):
        found = permute(np.arange(size), size, round_keys(seed)).astype(int)
        counts[np.arange(size), found] += 1
        pairs[(found[1] - found[0]) % size] += 1
    assert chisquare(counts.ravel()).pvalue > 1e-4
    assert pairs[0] == 0
    assert size == 2 or chisquare(pairs[1:]).pvalue > 1e-4


def test_of_four_numbers_every_order_comes():
    found = Counter(tuple(permute(np.arange(4), 4, round_keys(seed)).tolist()) for seed in range(1500))
    assert len(found) == 24
    assert max(found.values()) < 3 * min(found.values())


COUNTS = st.lists(
    st.dictionaries(st.sampled_from(["64x64", "64x96", "96x64"]), st.integers(1, 60), min_size=1),
    min_size=1,
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, data=st.data())
def test_shares_are_as_the_weights_say_to_within_rounding(counts, data):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(counts), max_size=len(counts)))
    total = sum(sum(one.values()) for one in counts)
    found = shares(counts, weights)
    assert {bucket: {share.dataset: share.samples for share in of} for bucket, of in found.items()} == {
        bucket: {d: one[bucket] for d, one in enumerate(counts) if bucket in one} for bucket in set().union(*counts)
    }
    for d, one in enumerate(counts):
        shown = {bucket: share.per_cycle for bucket, of in found.items() for share in of if share.dataset == d}
        whole = total * weights[d] / sum(weights)
        for bucket, per_cycle in shown.items():
            exact = whole * one[bucket] / sum(one.values())
            assert abs(per_cycle - exact) <= 0.5 + 1e-9 or (exact < 1 and per_cycle == 1)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS)
def test_without_weights_a_cycle_shows_every_sample_once(counts):
    assert all(share.per_cycle == share.samples for of in shares(counts).values() for share in of)


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(sum), key=st.integers(0, 2**64 - 1))
def test_kinds_are_mixed_evenly_and_each_keeps_its_order(counts, key):
    total = sum(counts)
    items = [interleaved(place, counts, key) for place in range(total)]
    for kind, count in enumerate(counts):
        places = [place for place, item in enumerate(items) if item[0] == kind]
        assert [items[place][1] for place in places] == list(range(count))
    for place in range(total):
        seen = Counter(kind for kind, _ in items[: place + 1])
        for kind, count in enumerate(counts):  # one is off by less than an interval, and so is the time that has passed
            assert abs(seen[kind] - count * (place + 1) / total) <= 1 + count * len(counts) / total


def test_keys_mix_kinds_differently():
    assert len({tuple(interleaved(place, [6, 6], key)[0] for place in range(12)) for key in range(20)}) > 15


def orders(smallest=1):
    """Orders of small data sets whose buckets all fill a batch."""

    def build(counts, weights, global_batch, seed):
        of = shares(counts, weights[: len(counts)] if weights else ())
        samples = [sum(share.samples for share in bucket) for bucket in of.values()]
        return Order(seed, max(smallest, min(global_batch, *samples)), of)

    weights = st.one_of(st.just([]), st.lists(st.floats(0.2, 5), min_size=3, max_size=3))
    return st.builds(build, COUNTS, weights, st.integers(2, 16), SEEDS)


def walk(order, steps):
    """Of the first steps: bucket, and (data set, sample, pass) of each place."""
    for step in range(1, steps + 1):
        places = order.places(step)
        yield (
            places.bucket,
            list(zip(*(x.tolist() for x in (places.dataset_B, places.index_B, places.pass_B)), strict=True)),
        )


@settings(max_examples=25, deadline=None)
@given(order=orders())
def test_each_pass_has_each_sample_once(order):
    cycles = 2
    steps = order.steps_through(cycles)
    shown = {}
    for bucket, samples in walk(order, steps):
        for dataset, sample, turn in samples:
            shown.setdefault((bucket, dataset, turn), []).append(sample)
    for (bucket, dataset, turn), samples in shown.items():
        share = next(share for share in order.shares[bucket] if share.dataset == dataset)
        assert len(set(samples)) == len(samples), "a sample came twice in a pass"
        # What the last batches have not reached yet is missing: a pass that all of its cycles' places are in is whole.
        reached = order.batches_through(bucket, cycles) * order.global_batch // order.per_cycle(bucket)
        if (turn + 1) * share.samples <= reached * share.per_cycle:
            assert sorted(samples) == list(range(share.samples))


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 60), global_batch=st.integers(1, 16), seed=SEEDS)
def test_no_sample_of_one_data_set_comes_again_before_all_others_of_its_bucket_have_come(count, global_batch, seed):
    order = Order(seed, min(global_batch, count), shares([{"64x64": count, "64x96": 20}]))
    rows = {}
    for bucket, samples in walk(order, order.steps_through(2)):
        rows.setdefault(bucket, []).extend(sample for _, sample, _ in samples)
    for bucket, size in (("64x64", count), ("64x96", 20)):
        for begin in range(0, len(rows[bucket]) - size, size):
            assert sorted(rows[bucket][begin : begin + size]) == list(range(size))


@settings(max_examples=25, deadline=None)
@given(order=orders())
def test_buckets_come_as_often_as_they_have_samples_and_every_step_is_of_one_cycle(order):
    cycles = 5
    seen = Counter(order.batch_of(step) for step in range(1, order.steps_through(cycles) + 1))
    assert set(seen.values()) == {1}, "a batch came twice"
    for bucket in order.shares:
        numbers = sorted(number for name, number in seen if name == bucket)
        assert numbers == list(range((cycles + 1) * order.per_cycle(bucket) // order.global_batch)), "one was left out"


@settings(max_examples=25, deadline=None)
@given(order=orders(), step=st.integers(1, 10**12))
def test_a_step_is_in_the_cycle_that_its_number_says(order, step):
    cycle = order.cycle_of(step)
    assert order.steps_through(cycle - 1) < step <= order.steps_through(cycle)
    bucket, batch = order.batch_of(step)
    assert order.batches_through(bucket, cycle - 1) <= batch < order.batches_through(bucket, cycle)


@settings(max_examples=25, deadline=None)
@given(order=orders(smallest=8), step=st.integers(1, 10**9), size=st.sampled_from([1, 2, 4, 8]))
def test_the_ranks_places_side_by_side_are_those_of_the_step(order, step, size):
    order = Order(order.seed, 8, order.shares)
    whole = order.places(step)
    share = 8 // size
    parts = [order.places(step, rank * share, (rank + 1) * share) for rank in range(size)]
    assert {part.bucket for part in parts} == {whole.bucket}
    for field in ("dataset_B", "index_B", "pass_B"):
        together = np.concatenate([getattr(part, field) for part in parts])
        assert together.tolist() == getattr(whole, field).tolist()


@pytest.mark.parametrize("weights", [(1.0, 3.0), (5.0, 1.0)])
def test_a_long_run_draws_data_sets_by_weight_and_buckets_by_their_samples(weights):
    counts = [{"64x64": 300, "64x96": 100}, {"64x64": 150, "96x64": 50}]
    order = Order(3, 10, shares(counts, weights))
    drawn, total = Counter(), 0
    for bucket, samples in walk(order, 600):
        drawn.update((bucket, dataset) for dataset, _, _ in samples)
        total += len(samples)
    for d, one in enumerate(counts):
        for bucket, samples in one.items():
            expected = weights[d] / sum(weights) * samples / sum(one.values())
            assert drawn[bucket, d] / total == pytest.approx(expected, rel=0.05)


def test_seeds_and_cycles_have_orders_of_their_own():
    of = shares([{"64x64": 40, "64x96": 40}])
    rows = [[step for step in walk(Order(seed, 4, of), 40)] for seed in (0, 1)]
    passes = [row[begin : begin + 20] for row in rows for begin in (0, 20)]
    assert all(a != b for a, b in itertools.combinations(passes, 2))


def test_each_pass_has_an_order_of_its_own():
    """A cycle of four steps shows half of the samples: every pass is halved in another way."""
    order = Order(0, 4, {"a": (Share(0, samples=32, per_cycle=16),)})
    halves = [
        {index for step in range(first, first + 4) for index in order.places(step).index_B.tolist()}
        for first in (1, 5, 9, 13)
    ]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(32))
    assert halves[0] not in halves[2:]


def test_a_small_share_is_shown_over_and_over():
    order = Order(0, 4, {"a": (Share(0, 3, 5), Share(1, 9, 7))})
    passes = Counter(place for _, samples in walk(order, order.steps_through(5)) for place in samples if place[0] == 0)
    assert sorted(passes) == [(0, sample, turn) for sample in range(3) for turn in range(10)]


def test_memory_does_not_grow_with_the_number_of_samples():
    def peak(samples):
        order = Order(0, 64, shares([{"64x64": samples, "64x96": samples}], [1.0]))
        tracemalloc.start()
        order.places(10**6 + 1)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1000)
    assert peak(10**13) < 1.5 * peak(1000) < 300_000
