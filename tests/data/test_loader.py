"""Batches are a function of seed and step, and the ranks' shares are the global batch, cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.data.loader import DataConfig, Loader, dataset_indices, open_dataset
from megadit.encoders.condition import Captions, Labels
from megadit.encoders.tokenizer import Tokenizer

GLOBAL_BATCH = 16
LENGTH = 28


@pytest.fixture(scope="module")
def train():
    return open_dataset(DataConfig(), "train")


@pytest.fixture(scope="module")
def heldout():
    return open_dataset(DataConfig(), "heldout")


@pytest.fixture(scope="module")
def captions(train):
    return Captions(Tokenizer.train(train.corpus(), 96), LENGTH)


@pytest.fixture
def loader(captions):
    def make(dataset, rank=0, size=1, seed=0, global_batch=GLOBAL_BATCH, condition=captions):
        return Loader(dataset, condition, seed, global_batch, rank, size)

    return make


def tensors(batch):
    """All tensors of a batch, by name."""
    assert batch.condition.keys() == {"text_ids_BL", "text_mask_BL"}
    return {"sample_ids_B": batch.sample_ids_B, "latents_BCHW": batch.latents_BCHW, **batch.condition}


def assert_equal(batch, other):
    for name, tensor in tensors(batch).items():
        assert torch.equal(tensor, tensors(other)[name]), name


SIZES = st.integers(1, 40)
SEEDS = st.integers(-(2**63), 2**64)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, dataset_size=SIZES, global_batch=SIZES, epochs=st.integers(1, 3))
def test_each_epoch_is_a_permutation_whatever_the_batch(seed, dataset_size, global_batch, epochs):
    steps = -(-epochs * dataset_size // global_batch)
    ids = torch.cat([dataset_indices(seed, step, dataset_size, global_batch) for step in range(1, steps + 1)])
    for epoch in ids[: epochs * dataset_size].view(epochs, dataset_size):
        assert epoch.sort().values.tolist() == list(range(dataset_size))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, step=st.integers(1, 10**9), dataset_size=SIZES, global_batch=SIZES)
def test_indices_depend_on_the_arguments_alone(seed, step, dataset_size, global_batch):
    before = torch.random.get_rng_state()
    first = dataset_indices(seed, step, dataset_size, global_batch)
    torch.rand(1)
    torch.manual_seed(step)
    assert torch.equal(first, dataset_indices(seed, step, dataset_size, global_batch))
    torch.random.set_rng_state(before)
    assert torch.equal(first, dataset_indices(seed, step, dataset_size, global_batch))
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"


def test_a_batch_over_the_end_of_an_epoch_takes_from_both():
    # 10 samples in batches of 4: the third batch holds the last two of the first epoch and the first two of the second.
    whole = torch.cat([dataset_indices(0, epoch, 10, 10) for epoch in (1, 2)])
    assert dataset_indices(0, 3, 10, 4).tolist() == whole[8:12].tolist()


def test_epochs_and_seeds_are_shuffled_apart():
    orders = {tuple(dataset_indices(seed, step, 100, 100).tolist()) for seed in (0, 1) for step in (1, 2)}
    assert len(orders) == 4


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 90])  # the 90th reaches over the end of the first epoch
def test_the_ranks_batches_side_by_side_are_the_one_rank_batch(size, step, train, loader):
    whole = loader(train).batch(step)
    parts = [loader(train, rank, size).batch(step) for rank in range(size)]
    assert [len(part) for part in parts] == [GLOBAL_BATCH // size] * size
    for name, tensor in tensors(whole).items():
        assert torch.equal(torch.cat([tensors(part)[name] for part in parts]), tensor), name


def test_a_batch_is_the_dataset_at_its_indices(train, loader):
    batch = loader(train).batch(3)
    assert batch.sample_ids_B.tolist() == list(range(2 * GLOBAL_BATCH, 3 * GLOBAL_BATCH))
    assert torch.equal(batch.latents_BCHW, train.images(dataset_indices(0, 3, len(train), GLOBAL_BATCH)))
    assert batch.latents_BCHW.dtype == torch.float32
    assert {value.shape for value in batch.condition.values()} == {(GLOBAL_BATCH, LENGTH)}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_of_classes_has_the_labels_of_its_scans(rank, train, loader):
    by_class = open_dataset(DataConfig(), "train", "class")
    batch = loader(by_class, rank, 2, condition=Labels(10)).batch(90)
    indices = dataset_indices(0, 90, len(train), GLOBAL_BATCH).chunk(2)[rank]
    assert batch.condition.keys() == {"labels_B"}
    assert batch.condition["labels_B"].tolist() == train.labels_N[indices].tolist()
    assert batch.condition["labels_B"].unique().numel() > 1, "shows nothing"
    assert torch.equal(batch.latents_BCHW, train.images(indices)), "the same scans as with captions"


def test_a_caption_depends_on_seed_step_and_place_alone(train, loader):
    def captions(seed, step, global_batch):
        return loader(train, seed=seed, global_batch=global_batch).batch(step).condition["text_ids_BL"]

    # Step 1 of any global batch begins with the same samples.
    small, large = captions(0, 1, 16), captions(0, 1, 64)
    assert torch.equal(small, large[:16])
    base, other_step, other_seed = (captions(seed, step, 64) for seed, step in ((0, 1), (0, 2), (1, 1)))
    assert not torch.equal(base, other_step) and not torch.equal(base, other_seed)


def test_an_image_that_comes_twice_in_a_batch_has_two_ids_and_captions_of_its_own(train, loader):
    batch = loader(train, global_batch=2 * len(train)).batch(1)
    assert batch.sample_ids_B.unique().numel() == len(batch)
    indices = dataset_indices(0, 1, len(train), 2 * len(train))
    text_ids_BL = batch.condition["text_ids_BL"]
    first = {index: ids for index, ids in zip(indices.tolist(), text_ids_BL, strict=True)}
    changed = [not torch.equal(first[i], ids) for i, ids in zip(indices.tolist(), text_ids_BL, strict=True)]
    # Of 14 templates, 13 in 14 captions change between the two showings.
    assert sum(changed) > 0.8 * len(train)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("global_batch", [16, 359, 512])  # of 359 scans: a rest, an exact fit, more than there are
def test_every_heldout_sample_counts_once_over_ranks_and_batches(size, global_batch, heldout, loader):
    if global_batch % size:
        global_batch += size - global_batch % size
    counts = torch.zeros(len(heldout))
    shares = [loader(heldout, rank, size, global_batch=global_batch).heldout() for rank in range(size)]
    shares = [list(share) for share in shares]
    assert len({len(share) for share in shares}) == 1, "all ranks make the same number of forward passes"
    for batch, weight_B in (pair for share in shares for pair in share):
        assert len(batch) == len(weight_B) == global_batch // size
        assert set(weight_B.tolist()) <= {0.0, 1.0}
        counts.index_add_(0, batch.sample_ids_B, weight_B)
    assert (counts == 1).all()


def test_heldout_captions_do_not_change_from_call_to_call(heldout, loader):
    for (batch, weight), (again, weight_again) in zip(
        loader(heldout).heldout(), loader(heldout).heldout(), strict=True
    ):
        assert_equal(batch, again)
        assert torch.equal(weight, weight_again)
