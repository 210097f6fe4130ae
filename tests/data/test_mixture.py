"""Data sets that do not fit each other or the training are refused by name; the two splits are all there is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megadit.data.manifest import open_manifest
from megadit.data.mixture import Mixture, Source, Wanted, check_encoders, open_sources
from megadit.data.shards import read_empty
from tests.data.encoded_sets import CHANNELS, POOLED, T5, VAE, write_set

WANTED = Wanted(global_batch=4, length=5, heldout=5)
COUNTS = {(64, 64): 12, (64, 96): 7}


@pytest.fixture
def opened(tmp_path):
    """Writes a data set of this name and opens it."""

    def write(name, counts=COUNTS, **settings):
        write_set(tmp_path / name, counts, **settings)
        return Source(tmp_path / name, open_manifest(tmp_path / name))

    return write


def numbers(mixture, split, dataset, bucket, count):
    return [
        int(mixture.reader(path).sample(row).latents_CHW[0, 0, 0])
        for path, row in mixture.locate(split, dataset, bucket, np.arange(count))
    ]


def test_the_splits_are_disjoint_and_together_all_samples(opened):
    mixture = Mixture([opened("a"), opened("b", {(64, 64): 9}, first=100)], WANTED)
    assert mixture.heldout_counts() == [{"64x64": 2, "64x96": 1}, {"64x64": 1}]
    assert {bucket.name: bucket.samples for bucket in mixture.buckets} == {"64x64": 18, "64x96": 6}
    assert mixture.num_samples == 24
    for dataset, bucket, expected in (
        (0, "64x64", range(12)),
        (0, "64x96", range(12, 19)),
        (1, "64x64", range(100, 109)),
    ):
        heldout = mixture.num_heldout(dataset, bucket)
        train = numbers(mixture, "train", dataset, bucket, len(expected) - heldout)
        assert sorted(train + numbers(mixture, "heldout", dataset, bucket, heldout)) == list(expected)


def test_nothing_is_held_out_where_nothing_is_wanted(opened):
    mixture = Mixture([opened("a")], replace(WANTED, heldout=0))
    assert mixture.heldout_counts() == [{"64x64": 0, "64x96": 0}]
    assert sorted(numbers(mixture, "train", 0, "64x64", 12)) == list(range(12))


@pytest.mark.parametrize("length", [2, 12])
@pytest.mark.parametrize("pooled", [False, True])
def test_nothing_is_the_empty_caption_padded_or_cut(length, pooled, opened):
    source = opened("a", pooled=pooled, dtype="bfloat16")
    mixture, empty = Mixture([source], replace(WANTED, length=length)), read_empty(source.folder)
    nothing, tokens = mixture.nothing(), min(length, len(empty.states_LC))
    assert nothing["text_states_BLC"].dtype == torch.bfloat16
    assert nothing["text_states_BLC"].shape == (1, length, CHANNELS)
    assert torch.equal(nothing["text_states_BLC"][0, :tokens], empty.states_LC[:tokens])
    assert not nothing["text_states_BLC"][0, tokens:].any()
    assert nothing["text_mask_BL"].tolist() == [[i < tokens for i in range(length)]]
    assert ("text_pooled_BP" in nothing) == pooled
    assert (mixture.text_channels, mixture.pooled_channels) == (CHANNELS, POOLED * pooled)
    if pooled:
        assert torch.equal(nothing["text_pooled_BP"][0], empty.pooled_P)


def test_a_class_that_is_not_told_is_the_one_after_the_last(opened):
    mixture = Mixture([opened("a", captions=0, classes=3)], Wanted(global_batch=4, classes=10))
    assert mixture.nothing()["labels_B"].tolist() == [10]
    assert mixture.text_channels == 0


def test_captions_that_are_cut_are_counted(opened, tmp_path):
    lengths = [
        len(c.states_LC) for name in "ab" for s in write_set(tmp_path / name, COUNTS).values() for c in s.captions
    ]
    sources = open_sources([tmp_path / "a", str(tmp_path / "b")])
    assert max(lengths) == 5
    for length in (1, 3, 5):
        mixture = Mixture(sources, replace(WANTED, length=length))
        assert mixture.num_too_long() == sum(tokens > length for tokens in lengths)


def test_more_shards_than_may_be_open_are_read_all_the_same(opened, monkeypatch):
    monkeypatch.setattr("megadit.data.mixture._OPEN_SHARDS", 2)
    mixture = Mixture([opened("a", shard=1)], replace(WANTED, heldout=0))
    readers = [mixture.reader(path) for path, _ in mixture.locate("train", 0, "64x64", np.arange(12))]
    assert len(mixture._readers) == 2
    assert sorted(int(reader.sample(0).latents_CHW[0, 0, 0]) for reader in readers) == list(range(12))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "bfloat16"}, ["is of float32", "of bfloat16"]),
        ({"text": (T5 | {"fingerprint": "z"},)}, ["fingerprint=a", "fingerprint=z"]),
        ({"text": (T5 | {"channels": 7},)}, ["channels=6", "channels=7"]),
        ({"text": (T5, T5)}, ["name=small", " and kind=t5"]),
        ({"autoencoder": VAE | {"scaling_factor": 2.0}}, ["name=vae", "scaling_factor=2.0"]),
        ({"autoencoder": None}, ["name=vae", "none"]),
    ],
)
def test_data_sets_of_other_encoders_are_not_mixed(changes, expected, opened, tmp_path):
    sources = [opened("one"), opened("other", **changes)]
    with pytest.raises(ValueError) as refused:
        Mixture(sources, WANTED)
    for words in (*expected, str(tmp_path / "one"), str(tmp_path / "other")):
        assert words in str(refused.value)


def test_the_same_weights_under_another_name_are_the_same_encoder(opened):
    other = {"text": (T5 | {"name": "/a/copy", "length": 77},), "autoencoder": VAE | {"name": "/another"}}
    assert len(Mixture([opened("one"), opened("other", **other)], WANTED).sources) == 2


def test_latents_of_one_size_have_one_shape(opened):
    one = opened("one")
    other = Source(one.folder.with_name("other"), one.manifest)
    buckets = tuple(replace(bucket, latent=(3, *bucket.latent[1:])) for bucket in one.manifest.buckets)
    with pytest.raises(
        ValueError, match=r"bucket 64x64 has latents of \[2, 4, 4\] in .*one and of \[3, 4, 4\] in .*other"
    ):
        Mixture([one, replace(other, manifest=replace(one.manifest, buckets=buckets))], WANTED)


@pytest.mark.parametrize(
    ("settings", "wanted", "expected"),
    [
        ({}, {"global_batch": 7}, "data.global_batch=7: 64x96 (6 samples); set data.global_batch to at most 6"),
        ({}, {"global_batch": 17, "small_buckets": "drop"}, "is empty: of its 19 samples none is left"),
        (
            {"counts": {(64, 64): 1}},
            {"global_batch": 1, "small_buckets": "drop"},
            "held out: one in 5, and at least one",
        ),
        ({"counts": {}}, {}, "is empty: of its 0 samples none is left"),
        ({}, {"weights": (1.0, 2.0)}, "2 weights for 1 data sets"),
        ({}, {"weights": (0.0,)}, "has weight 0.0; leave it out"),
        ({}, {"length": 3, "too_long": "error"}, "captions of up to 5 tokens, text.length=3; set text.length=5"),
        ({}, {"length": 0, "classes": 4}, "has no labels; encode it with classes"),
        ({"captions": 0, "classes": 3}, {}, "has no captions; encode it with them"),
        (
            {"captions": 0, "classes": 3},
            {"length": 0, "classes": 2},
            "has classes up to 2, model.classes=2 has no room",
        ),
    ],
)
def test_what_a_training_cannot_use_is_refused(settings, wanted, expected, opened):
    source = opened("a", **settings)
    with pytest.raises(ValueError) as refused:
        Mixture([source], replace(WANTED, **wanted))
    assert expected in str(refused.value)


def test_small_buckets_are_dropped_where_that_is_wanted_and_weights_are_of_what_is_left(opened):
    sources = [opened("a"), opened("b", {(64, 64): 20, (96, 64): 3}, first=100)]
    mixture = Mixture(sources, replace(WANTED, global_batch=8, small_buckets="drop", weights=(1, 1)))
    assert mixture.dropped == ["64x96", "96x64"]
    assert [bucket.name for bucket in mixture.buckets] == ["64x64"]
    assert mixture.heldout_counts() == [{"64x64": 2}, {"64x64": 4}]
    assert [share.per_cycle for share in mixture.shares["64x64"]] == [13, 13]


def test_a_data_set_that_loses_all_its_buckets_is_named(opened, tmp_path):
    sources = [opened("a"), opened("b", {(96, 64): 3}, first=100)]
    with pytest.raises(ValueError, match=f"data set {tmp_path / 'b'} is empty.*dropped buckets.*: 96x64"):
        Mixture(sources, replace(WANTED, small_buckets="drop"))


@pytest.mark.parametrize(
    ("text", "autoencoder", "expected"),
    [
        ([{"kind": "t5", "name": "small"}], None, None),
        ([{"kind": "t5", "name": "small", "fingerprint": "a"}], {"name": "vae"}, None),
        ([{"kind": "t5", "name": "large"}], None, ["kind=t5 name=small", "asks for kind=t5 name=large"]),
        ([{"kind": "t5", "name": "small"}, {"kind": "clip", "name": "b"}], None, ["and kind=clip name=b"]),
        ([{"kind": "clip", "name": "small"}], None, ["kind=t5 name=small", "asks for kind=clip name=small"]),
        ([], None, ["kind=t5 name=small", "asks for no text encoder"]),
        ([{"kind": "t5"}], {"name": "other"}, ["name=vae", "asks for name=other"]),
    ],
)
def test_the_encoders_that_are_asked_for_are_those_of_the_manifest(text, autoencoder, expected, opened, tmp_path):
    source = opened("a")
    if expected is None:
        check_encoders([source], text, autoencoder)
        return
    with pytest.raises(ValueError) as refused:
        check_encoders([source], text, autoencoder)
    for words in (*expected, str(tmp_path / "a")):
        assert words in str(refused.value)


def test_no_folder_is_no_data_set():
    with pytest.raises(ValueError, match="no data set is named"):
        open_sources([])


def test_text_of_another_width_than_the_empty_captions_is_refused(opened):
    wide = opened("wide", pooled=True)
    narrow = opened("narrow")
    (narrow.folder / "empty.safetensors").write_bytes((wide.folder / "empty.safetensors").read_bytes())
    content = json.loads((narrow.folder / "manifest.json").read_text())
    content["empty_sha256"] = json.loads((wide.folder / "manifest.json").read_text())["empty_sha256"]
    (narrow.folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"64x64_000000.safetensors: pooled is missing, but float32 \[5\] in the empty"
    ):
        open_manifest(narrow.folder)
