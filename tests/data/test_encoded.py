"""Batches of encoded data sets are a function of seed and step, whoever reads them and from where; each has what was
written.
"""

import gc
import os
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.data.encoded import EncodedLoader, drawn
from megadit.data.mixture import Mixture, Wanted, open_sources
from megadit.data.shards import ShardReader
from megadit.runtime.seed import stream
from tests.data.encoded_sets import BUCKETS, CHANNELS, POOLED, write_set

LENGTH, GLOBAL_BATCH = 5, 8
WANTED = Wanted(global_batch=GLOBAL_BATCH, length=LENGTH, heldout=8, weights=(1.0, 2.0))
COUNTS = ({(64, 64): 30, (64, 96): 12}, {(64, 64): 10, (96, 64): 17})
SEEDS = st.integers(-(2**63), 2**64)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folders, samples by number) of two data sets."""
    folder = tmp_path_factory.mktemp("encoded")
    samples = write_set(folder / "one", COUNTS[0], pooled=True)
    samples |= write_set(folder / "two", COUNTS[1], pooled=True, first=100)
    return [folder / "one", folder / "two"], samples


@pytest.fixture(scope="module")
def mixture(written):
    return Mixture(open_sources(written[0]), WANTED)


@pytest.fixture(scope="module")
def loader(mixture):
    made = []

    def make(seed=0, rank=0, size=1, of=mixture, **settings):
        made.append(EncodedLoader(of, seed, rank, size, **{"threads": 1, "ahead": 1} | settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def tensors(batch):
    return {"sample_ids_B": batch.sample_ids_B, "latents_BCHW": batch.latents_BCHW, **batch.condition}


def together(batches):
    return {name: torch.cat([tensors(batch)[name] for batch in batches]) for name in tensors(batches[0])}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def numbers(batch):
    """The samples of a batch."""
    return batch.latents_BCHW[:, 0, 0, 0].int().tolist()


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, steps=st.lists(st.integers(1, 400), min_size=1, max_size=4), sizes=st.permutations([1, 2, 4, 8]))
def test_batches_are_the_same_for_every_number_of_ranks_and_from_any_step_on(seed, steps, sizes, loader):
    one = loader(seed)
    for step, size in zip(steps, sizes, strict=False):
        whole = tensors(one.batch(step))
        parts = [loader(seed, rank, size).batch(step) for rank in range(size)]  # that have read no step before
        assert {len(part) for part in parts} == {GLOBAL_BATCH // size}
        assert_equal(together(parts), whole)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, first=st.integers(1, 10**6), changes=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=4))
def test_a_run_that_changes_its_number_of_ranks_sees_what_one_rank_sees(seed, first, changes, loader):
    one, step = loader(seed, ahead=3), first
    for size in changes:
        ranks = [loader(seed, rank, size, ahead=2) for rank in range(size)]
        for _ in range(3):
            assert_equal(together([rank.batch(step) for rank in ranks]), tensors(one.batch(step)))
            step += 1


def test_a_batch_has_what_was_written(written, loader):
    shown = Counter()
    for step in range(1, 30):
        batch = loader(3).batch(step)
        assert batch.sample_ids_B.tolist() == list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH))
        assert batch.latents_BCHW.dtype == torch.float32
        assert batch.latents_BCHW.shape[1:] in BUCKETS.values()
        told = batch.condition
        assert told.keys() == {"text_states_BLC", "text_mask_BL", "text_pooled_BP"}
        assert told["text_states_BLC"].shape == (GLOBAL_BATCH, LENGTH, CHANNELS)
        assert told["text_pooled_BP"].shape == (GLOBAL_BATCH, POOLED)
        for i, number in enumerate(numbers(batch)):
            sample = written[1][number]
            assert torch.equal(batch.latents_BCHW[i], sample.latents_CHW)
            place = int(told["text_states_BLC"][i, 0, 1])
            caption = sample.captions[place]
            tokens = len(caption.states_LC)
            assert torch.equal(told["text_states_BLC"][i, :tokens], caption.states_LC)
            assert not told["text_states_BLC"][i, tokens:].any()
            assert told["text_mask_BL"][i].tolist() == [j < tokens for j in range(LENGTH)]
            assert torch.equal(told["text_pooled_BP"][i], caption.pooled_P)
            shown[place] += 1
    # The second of two captions has twice the weight of the first.
    assert shown[1] / shown.total() == pytest.approx(2 / 3, abs=0.1)


def test_a_caption_is_drawn_for_the_seed_the_step_and_the_place(written, mixture, loader):
    for step in (1, 7):
        batch = loader(5).batch(step)
        for i, number in enumerate(numbers(batch)):
            weights = np.array([caption.weight for caption in written[1][number].captions], np.float32)
            expected = drawn(weights, stream(5, "caption", step, (step - 1) * GLOBAL_BATCH + i))
            assert int(batch.condition["text_states_BLC"][i, 0, 1]) == expected


def test_captions_are_drawn_by_weight():
    weights = np.array([1, 5, 2], np.float32)
    counts = Counter(drawn(weights, stream(0, i)) for i in range(4000))
    for index, weight in enumerate(weights):
        assert counts[index] / 4000 == pytest.approx(weight / 8, abs=0.03)
    assert {drawn(weights[:1], stream(0, i)) for i in range(10)} == {0}


def test_one_data_set_shows_every_sample_once_in_an_epoch(written, loader):
    one = Mixture(open_sources(written[0][:1]), replace(WANTED, weights=(), global_batch=2))
    heldout = {"64x64": 3, "64x96": 1}
    assert one.heldout_counts() == [heldout]
    # 27 and 11 samples in batches of 2 fill 19 steps of two cycles exactly.
    reading, seen = loader(of=one), Counter()
    for step in range(1, 39):
        seen.update(numbers(reading.batch(step)))
    assert len(seen) == 38
    assert set(seen.values()) == {2}
    unseen = set(range(42)) - set(seen)
    told = set()
    for batch, weight_B in reading.heldout():
        told |= {number for number, weight in zip(numbers(batch), weight_B.tolist(), strict=True) if weight}
    assert unseen == told


def test_a_rank_reads_its_own_samples_and_nothing_else(mixture, loader, monkeypatch):
    read, own = Counter(), loader(rank=1, size=4, ahead=0)
    whole = ShardReader.read_latents

    def counted(reader, index, out):
        read[threading.current_thread()] += 1
        return whole(reader, index, out)

    monkeypatch.setattr(ShardReader, "read_latents", counted)
    own.batch(9)
    # Loaders of other tests may still read ahead.
    assert sum(read[thread] for thread in own._pool._threads) == GLOBAL_BATCH // 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_heldout_sample_counts_once_over_ranks_and_batches(size, mixture, written, loader):
    shares = [list(loader(rank=rank, size=size).heldout()) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1, "all ranks make the same number of forward passes"
    counts, ids = Counter(), {}
    for rows in zip(*shares, strict=True):
        assert len({batch.latents_BCHW.shape[1:] for batch, _ in rows}) == 1, "one bucket at a time"
        for batch, weight_B in rows:
            assert len(batch) == len(weight_B) == GLOBAL_BATCH // size
            for number, sample_id, weight in zip(
                numbers(batch), batch.sample_ids_B.tolist(), weight_B.tolist(), strict=True
            ):
                assert ids.setdefault(sample_id, number) == number
                counts[number] += weight
    assert set(counts.values()) == {1.0}
    assert len(counts) == len(ids) == sum(sum(one.values()) for one in mixture.heldout_counts()) == 3 + 1 + 1 + 2
    trained = {number for step in range(1, 40) for number in numbers(loader().batch(step))}
    assert not trained & set(counts)


def test_heldout_batches_do_not_change_from_call_to_call(loader):
    for (batch, weight_B), (again, weight_again_B) in zip(loader(1).heldout(), loader(1).heldout(), strict=True):
        assert_equal(tensors(batch), tensors(again))
        assert torch.equal(weight_B, weight_again_B)


def test_longer_captions_are_cut_to_what_the_network_reads(written, loader):
    short = Mixture(open_sources(written[0]), replace(WANTED, length=2))
    whole, cut = loader().batch(4), loader(of=short).batch(4)
    assert torch.equal(cut.condition["text_states_BLC"], whole.condition["text_states_BLC"][:, :2])
    assert torch.equal(cut.condition["text_mask_BL"], whole.condition["text_mask_BL"][:, :2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_text_stays_in_the_dtype_of_the_shards(dtype, tmp_path, loader):
    samples = write_set(tmp_path / "set", {(64, 64): 12}, dtype)
    of = Mixture(open_sources([tmp_path / "set"]), replace(WANTED, weights=()))
    batch = loader(of=of).batch(1)
    assert batch.condition.keys() == {"text_states_BLC", "text_mask_BL"}
    assert batch.condition["text_states_BLC"].dtype == of.nothing()["text_states_BLC"].dtype == getattr(torch, dtype)
    for i, number in enumerate(numbers(batch)):
        assert torch.equal(batch.latents_BCHW[i], samples[number].latents_CHW.float())


def test_classes_are_the_labels_of_their_samples(tmp_path, loader):
    write_set(tmp_path / "set", {(64, 64): 12}, captions=0, classes=5)
    wanted = Wanted(global_batch=4, classes=5)
    batch = loader(of=Mixture(open_sources([tmp_path / "set"]), wanted), rank=1, size=2).batch(2)
    assert batch.condition.keys() == {"labels_B"}
    assert batch.condition["labels_B"].dtype == torch.int64
    assert batch.condition["labels_B"].tolist() == [number % 5 for number in numbers(batch)]


def test_steps_are_read_ahead_and_no_more_of_them_than_wanted(mixture, loader, monkeypatch):
    read, done = [], threading.Event()
    whole = EncodedLoader._read_step

    def noted(self, step):
        batch = whole(self, step)
        read.append(step)
        if len(read) == 4:
            done.set()
        return batch

    monkeypatch.setattr(EncodedLoader, "_read_step", noted)
    reading = loader(ahead=3, threads=2)
    reading.batch(1)
    assert done.wait(30)
    assert sorted(read) == [1, 2, 3, 4]
    reading.batch(2)
    reading.batch(100)  # a jump: what was read ahead is dropped
    assert set(reading._coming) == {101, 102, 103}
    assert_equal(tensors(reading.batch(2)), tensors(loader().batch(2)))


def test_a_shard_that_goes_is_told_by_the_step_that_needs_it_and_others_are_read(tmp_path, loader):
    write_set(tmp_path / "set", {(64, 64): 12, (64, 96): 12})
    of = Mixture(open_sources([tmp_path / "set"]), Wanted(global_batch=2, length=LENGTH, heldout=0))
    for path in (tmp_path / "set" / "shards").glob("64x96*"):
        os.truncate(path, 100)
    outcomes = Counter()
    reading = loader(of=of, ahead=4, threads=2)
    for step in range(1, 13):
        bucket, _ = reading.order.batch_of(step)
        if bucket == "64x64":
            assert len(reading.batch(step)) == 2
        else:
            with pytest.raises(ValueError, match="64x96_.*safetensors"):
                reading.batch(step)
        outcomes[bucket] += 1
    assert outcomes == {"64x64": 6, "64x96": 6}


def test_a_loader_that_is_gone_leaves_no_threads(mixture):
    before = threading.active_count()
    for end in (EncodedLoader.close, lambda reading: None):
        reading = EncodedLoader(mixture, 0, 0, 1, threads=3, ahead=5)
        reading.batch(1)
        assert threading.active_count() > before
        end(reading)
        threads = list(reading._pool._threads)
        del reading
        gc.collect()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_many_threads_read_what_one_reads(mixture, loader, monkeypatch):
    monkeypatch.setattr("megadit.data.mixture._OPEN_SHARDS", 2)
    many, one = loader(threads=8, ahead=16), loader(threads=1, ahead=0)
    for step in range(1, 60):
        assert_equal(tensors(many.batch(step)), tensors(one.batch(step)))
