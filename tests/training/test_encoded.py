"""Runs on encoded data sets: what is refused, and that layouts, worlds and restarts read the same samples."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.data.encoded import EncodedLoader
from megadit.data.manifest import MANIFEST_FILE
from megadit.training.build import read_inputs
from megadit.training.config import check, load_config
from megadit.training.step import draw, draw_kept
from tests.data.encoded_sets import CHANNELS, POOLED, T5, write_set
from tests.ranks import run_ranks, train_on
from tests.training.assembled import assembled, make_step

CONFIG = "tests/configs/tiny.yaml"
SIZES = {(64, 64): 40, (64, 96): 24, (96, 64): 17}
SHARDS = (
    *(
        "data.kind=shards",
        "data.global_batch=8",
        "data.micro_batch=2",
        "data.heldout=8",
        "model.channels=2",
        "model.image_size=4",
    ),
    *("model.patch=1", "text.kind=t5", f"text.channels={CHANNELS}", "text.length=4", "model.positions=rotary"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded") / "set"
    write_set(folder, SIZES)
    return folder


def inputs_of(folder, *overrides):
    config = load_config(CONFIG, (*SHARDS, f"data.path={folder}", *overrides))
    check(config, 1)
    return read_inputs(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.channels=3", "latents have 2 channels; set model.channels=2"),
        ("text.channels=7", "text states are 6 wide; set text.channels=6"),
        ("text.kind=clip", "captions of kind=t5 .*asks for kind=clip"),
        ("text.t5=large", "captions of kind=t5 name=small .*asks for kind=t5 name=large"),
        ("data.autoencoder=other", "latents of the autoencoder name=vae .*asks for name=other"),
        ("text.kind=builtin", "text.kind=builtin reads text, .*use text.kind=t5"),
        ("data.global_batch=32", r"64x96 \(21 samples\), 96x64 \(15 samples\); set data.global_batch to at most 15"),
        ("model.patch=4", "latent images of 4 x 6 cannot be cut into patches of model.patch=4"),
        ("text.too_long=error", "captions of up to 5 tokens, text.length=4; set text.length=5"),
        ("data.heldout=1", "data.heldout=1 holds every sample out"),
        ("data.heldout=0 and log.evaluate_every=5", "data.heldout=0 leaves nothing to evaluate"),
        ("data.sets={a: 1}", "data.path, or several with weights, data.sets; set one of the two"),
        ("data.path=", "data.path, or several with weights, data.sets; set one of the two"),
        ("data.path=nowhere", "data set nowhere: there is no such folder"),
        ("model.routing_group=3", "does not divide the 2 images of a microbatch"),
    ],
)
def test_what_does_not_fit_is_refused(folder, override, message):
    with pytest.raises(ValueError, match=message):
        inputs_of(folder, *override.split(" and "))


def test_a_branch_is_not_compared_with_a_commit(tmp_path):
    commit = "0123456789" * 4
    write_set(tmp_path / "set", SIZES, text=(T5 | {"revision": commit},))
    for revision in ("main", commit):
        inputs_of(tmp_path / "set", f'text.t5_revision="{revision}"')
    with pytest.raises(ValueError, match=f"revision={commit} .*asks for .*revision={'f' * 40}"):
        inputs_of(tmp_path / "set", f"text.t5_revision={'f' * 40}")


def test_data_sets_that_differ_in_length_alone_are_mixed(tmp_path):
    for name, length in (("a", 77), ("b", 128)):
        write_set(tmp_path / name, SIZES, text=(T5 | {"length": length},))
    sets = f"data.sets={{{tmp_path / 'a'}: 3, {tmp_path / 'b'}: 1}}"
    shares = inputs_of("", sets, "data.autoencoder=vae").train.shares["64x64"]
    assert [share.per_cycle for share in shares] == [52, 18]  # of 35 each, three times as many of the first


def test_pooled_vectors_must_be_there(tmp_path):
    write_set(tmp_path / "pooled", SIZES, pooled=True)
    assert inputs_of(tmp_path / "pooled", "text.kind=precomputed", f"text.pooled={POOLED}").image_shape == (2, 4, 4)
    with pytest.raises(ValueError, match=f"pooled vectors are {POOLED} wide, 0 is none; set text.pooled={POOLED}"):
        inputs_of(tmp_path / "pooled", "text.kind=precomputed", "text.pooled=9")


def test_a_shard_that_is_missing_or_changed_is_named(tmp_path):
    write_set(tmp_path / "set", SIZES)
    shard = sorted((tmp_path / "set" / "shards").iterdir())[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    inputs_of(tmp_path / "set")
    with pytest.raises(ValueError, match=f"{shard.name}.*content has changed"):
        inputs_of(tmp_path / "set", "data.verify=true")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}"):
        inputs_of(tmp_path / "set")


def test_a_data_set_that_was_not_finished_is_refused(tmp_path):
    write_set(tmp_path / "set", SIZES)
    (tmp_path / "set" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=MANIFEST_FILE):
        inputs_of(tmp_path / "set")


def test_prompts_are_numbers_of_held_out_captions(folder):
    inputs = inputs_of(folder)
    told = inputs.condition.encode(inputs.prompts(7))
    assert inputs.prompts(7) == ["0", "1", "2", "3", "4", "0", "1"]  # one in 8 of 40
    trained = {
        int(inputs.train.reader(path).sample(row).captions[0].states_LC[0, 0]) for path, row in train_places(inputs)
    }
    shown = [int(number) for number in told["text_states_BLC"][:, 0, 0]]
    assert len(set(shown)) == 5 and not trained & set(shown)
    with pytest.raises(ValueError, match="'a cat' is not the number of a stored caption, 0 to 9"):
        inputs.condition.encode(["a cat"])
    with pytest.raises(ValueError, match="'10' is not the number"):
        inputs.condition.encode(["10"])


def test_captions_of_every_bucket_have_a_number_and_the_largest_buckets_come_first(folder):
    inputs = inputs_of(folder)
    loader = EncodedLoader(inputs.train, 0, 0, 1)
    heldout = {
        int(number): latents.shape[1:]
        for batch, weight_B in loader.heldout()
        for number, latents, weight in zip(batch.latents_BCHW[:, 0, 0, 0], batch.latents_BCHW, weight_B, strict=True)
        if weight
    }
    states_BLC = inputs.condition.encode(list(map(str, range(10))))["text_states_BLC"]
    told = [int(number) for number in states_BLC[:, 0, 0]]
    assert sorted(told) == sorted(heldout) and len(heldout) == 5 + 3 + 2
    assert [tuple(heldout[number]) for number in told] == [(4, 4)] * 5 + [(4, 6)] * 3 + [(6, 4)] * 2
    # A bucket that a larger batch drops is among the last.
    few = inputs_of(folder, "data.global_batch=18", "data.small_buckets=drop")
    assert len(few.condition) == 8
    again = few.condition.encode(list(map(str, range(8))))["text_states_BLC"]
    assert torch.equal(again, states_BLC[:8])


def test_where_none_are_held_out_prompts_are_those_to_train_on(folder):
    inputs = inputs_of(folder, "data.heldout=0")
    assert len(inputs.condition) == 40 + 24 + 17 and inputs.prompts(41) == [*map(str, range(40)), "0"]
    told = inputs.condition.encode([str(i) for i in range(81)])["text_states_BLC"][:, 0, 0]
    assert sorted(told.int().tolist()) == list(range(81))


def train_places(inputs):
    return inputs.train.locate("train", 0, "64x64", np.arange(35))


def losses(rank, world_size, path, first, last, overrides):
    run = assembled(rank, world_size, *SHARDS, f"data.path={path}", "run.dtype=float64", "zero.stage=0", *overrides)
    try:
        return [make_step(run, step).values.tolist()[1] for step in range(first, last + 1)]
    finally:
        run.loader.close()


def test_classes_are_trained_on_without_text(tmp_path):
    write_set(tmp_path / "classes", SIZES, captions=0, classes=3)
    by_class = ("text.kind=builtin", "model.conditioning=class", "model.classes=3")
    inputs = inputs_of(tmp_path / "classes", *by_class)
    assert inputs.prompts(5) == ["0", "1", "2", "0", "1"]
    for found in run_ranks(losses, 2, tmp_path / "classes", 1, 2, by_class):
        assert len(set(found)) == 2 and np.isfinite(found).all()
    with pytest.raises(ValueError, match="classes up to 2, model.classes=2 has no room"):
        inputs_of(tmp_path / "classes", *by_class, "model.classes=2")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), step=st.integers(1, 500))
def test_what_is_dropped_does_not_depend_on_the_number_of_ranks(folder, seed, step):
    """Captions and tokens that a sample is shown without, and its noise and time, at any step."""
    mixture, found = inputs_of(folder).train, []
    for size in (1, 2, 4, 8):
        loaders = [EncodedLoader(mixture, seed, rank, size, ahead=0) for rank in range(size)]
        batches = [loader.batch(step) for loader in loaders]
        draws = [draw(seed, step, batch) for batch in batches]
        kept = [draw_kept(seed, step, batch.sample_ids_B.tolist(), 16, 7) for batch in batches]
        noise, normal, uniform = (
            torch.cat(parts) for parts in zip(*(vars(each).values() for each in draws), strict=True)
        )
        found.append((noise, normal, uniform, torch.cat(kept), torch.cat([batch.sample_ids_B for batch in batches])))
        for loader in loaders:
            loader.close()
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))


def test_every_world_trains_on_the_same_samples(folder):
    """Of several sizes: the losses of six steps, of which each updates the weights."""
    (alone,) = run_ranks(losses, 1, folder, 1, 6, ())
    assert len(set(alone)) == 6
    for world_size, overrides in (
        (2, ()),
        (4, ("parallel.expert=2",)),
        (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    ):
        for found in run_ranks(losses, world_size, folder, 1, 6, overrides):
            assert found == pytest.approx(alone, rel=1e-9)


def test_a_run_goes_on_with_the_samples_that_come_next(folder, tmp_path):
    """Stopped after step 3 on two ranks, on four from then on: metrics.jsonl says what was trained on."""

    def train(name, world_size, steps):
        overrides = (f"data.path={folder}", f"run.dir={tmp_path / name}", f"run.steps={steps}", "log.sample_ids=true")
        ends = train_on(
            world_size, "--config", CONFIG, *SHARDS, *overrides, "checkpoint.every=3", "optim.decay=constant"
        )
        assert [status for status, _ in ends] == [0] * world_size, ends[0][1]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(line["sample_ids"], line["loss"]) for line in map(json.loads, lines)]

    whole = train("whole", 2, 6)
    train("parts", 2, 3)
    for (ids, loss), (expected_ids, expected) in zip(train("parts", 4, 6), whole, strict=True):
        assert ids == expected_ids
        assert loss == pytest.approx(expected, rel=2e-5)
