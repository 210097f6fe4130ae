"""What is written is read, byte for byte, also by the safetensors library; what has changed is refused by name."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadit.data.manifest import EMPTY_FILE, MANIFEST_FILE, header_sha256, open_manifest, shard_path, write_manifest
from megadit.data.shards import Caption, Sample, ShardReader, read_empty, write_shard
from megadit.runtime.tensor_file import HashedTensorFileWriter
from tests.data.encoded_sets import BUCKETS, make_sample, write_set

LATENT = BUCKETS[64, 96]


def assert_same(found, written):
    assert found.key == written.key
    assert found.label == written.label
    assert found.latents_CHW.dtype == written.latents_CHW.dtype
    assert torch.equal(found.latents_CHW, written.latents_CHW)
    assert len(found.captions) == len(written.captions)
    for caption, other in zip(found.captions, written.captions, strict=True):
        assert caption.weight == other.weight
        assert caption.states_LC.dtype == other.states_LC.dtype
        assert torch.equal(caption.states_LC, other.states_LC)
        assert (caption.pooled_P is None) == (other.pooled_P is None)
        assert other.pooled_P is None or torch.equal(caption.pooled_P, other.pooled_P)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "kind", [{}, {"captions": 1}, {"pooled": True}, {"captions": 0, "classes": 3}, {"captions": 3, "classes": 3}]
)
def test_samples_come_back_as_they_were_written(dtype, kind, tmp_path):
    samples = [make_sample(number, LATENT, dtype, **kind) for number in range(7)]
    entry = write_shard(tmp_path / "one.safetensors", samples)
    assert (entry.file, entry.samples, entry.bytes) == ("one.safetensors", 7, os.path.getsize(tmp_path / entry.file))
    assert entry.captions == sum(len(sample.captions) for sample in samples)
    assert entry.longest == max((len(c.states_LC) for sample in samples for c in sample.captions), default=0)
    assert entry.classes == kind.get("classes", 0)
    reader = ShardReader(tmp_path / "one.safetensors")
    assert len(reader) == 7
    for index in (3, 0, 6, 1, 2, 4, 5):
        assert_same(reader.sample(index), samples[index])
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_the_library_reads_the_same_tensors(tmp_path):
    samples = [make_sample(number, LATENT, torch.bfloat16, captions=number % 3 + 1, pooled=True) for number in range(5)]
    write_shard(tmp_path / "one.safetensors", samples)
    found = load_file(tmp_path / "one.safetensors")
    captions = [caption for sample in samples for caption in sample.captions]
    assert torch.equal(found["latents"], torch.stack([sample.latents_CHW for sample in samples]))
    assert torch.equal(found["states"], torch.cat([caption.states_LC for caption in captions]))
    assert torch.equal(found["pooled"], torch.stack([caption.pooled_P for caption in captions]))
    assert found["caption_begin"].tolist() == [0, 1, 3, 6, 7, 9]
    assert found["token_begin"].diff().tolist() == [len(caption.states_LC) for caption in captions]
    assert found["caption_weight"].tolist() == [caption.weight for caption in captions]
    assert bytes(found["keys"].tolist()).decode() == "".join(sample.key for sample in samples)


def test_what_the_library_writes_is_read(tmp_path):
    samples = [make_sample(number, LATENT) for number in range(3)]
    write_shard(tmp_path / "ours.safetensors", samples)
    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "theirs.safetensors")
    reader = ShardReader(tmp_path / "theirs.safetensors")
    for index, sample in enumerate(samples):
        assert_same(reader.sample(index), sample)


def test_the_same_samples_make_the_same_bytes(tmp_path):
    entries = [
        write_shard(tmp_path / f"{name}.safetensors", [make_sample(number, LATENT) for number in range(4)])
        for name in "ab"
    ]
    assert entries[0].sha256 == entries[1].sha256
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_writer_that_is_killed_leaves_no_shard_and_the_next_one_writes_it(tmp_path, monkeypatch):
    path, samples = tmp_path / "one.safetensors", [make_sample(0, LATENT)]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(HashedTensorFileWriter, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            write_shard(path, samples)
    assert not path.exists()
    assert any(tmp_path.iterdir())
    write_shard(path, samples)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "samples",
    [
        [make_sample(0, LATENT), make_sample(1, BUCKETS[64, 64])],
        [make_sample(0, LATENT), make_sample(1, LATENT, torch.bfloat16)],
        [make_sample(0, LATENT), make_sample(1, LATENT, classes=2)],
        [make_sample(0, LATENT), make_sample(1, LATENT, captions=0)],
        [make_sample(0, LATENT), make_sample(1, LATENT, pooled=True)],
        [Sample("a", torch.zeros(LATENT))],
        [Sample("a", torch.zeros(LATENT), [Caption(torch.zeros(1, 2), weight=0.0)])],
        [Sample("", torch.zeros(LATENT), label=0)],
        [],
    ],
)
def test_samples_that_are_not_alike_are_no_shard(samples, tmp_path):
    with pytest.raises(AssertionError):
        write_shard(tmp_path / "one.safetensors", samples)
    assert not list(tmp_path.iterdir())


COUNTS = {(64, 64): 7, (64, 96): 4}
FIRST_SHARD = "64x64_000000.safetensors"


def test_a_manifest_says_what_is_there(tmp_path):
    folder = tmp_path / "set"
    samples = write_set(folder, COUNTS, "bfloat16", pooled=True, quarantined=3, resolutions={"rule": "one"})
    manifest = open_manifest(folder, verify=True)
    assert (manifest.samples, manifest.captions, manifest.quarantined, manifest.classes) == (11, 22, 3, 0)
    assert [(bucket.name, bucket.samples, bucket.latent) for bucket in manifest.buckets] == [
        ("64x64", 7, (2, 4, 4)),
        ("64x96", 4, (2, 4, 6)),
    ]
    assert manifest.longest == max(len(c.states_LC) for sample in samples.values() for c in sample.captions)
    assert manifest.resolutions == {"rule": "one"}
    number = 0
    for bucket in manifest.buckets:
        for shard in bucket.shards:
            reader = ShardReader(shard_path(folder, shard.file))
            for index in range(shard.samples):
                assert_same(reader.sample(index), samples[number])
                number += 1
    content = json.loads((folder / MANIFEST_FILE).read_text())
    assert (content["format"], content["samples"], content["captions"]) == (1, 11, 22)
    assert [bucket["samples"] for bucket in content["buckets"]] == [7, 4]
    empty = read_empty(folder)
    written = make_sample(10**6, BUCKETS[64, 64], torch.bfloat16, captions=1, pooled=True).captions[0]
    assert torch.equal(empty.states_LC, written.states_LC) and torch.equal(empty.pooled_P, written.pooled_P)


def test_writing_a_manifest_that_was_read_changes_nothing(tmp_path):
    write_set(tmp_path / "set", COUNTS)
    before = (tmp_path / "set" / MANIFEST_FILE).read_bytes()
    write_manifest(tmp_path / "set", open_manifest(tmp_path / "set"))
    assert (tmp_path / "set" / MANIFEST_FILE).read_bytes() == before


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(change):
    """A manifest that says something else."""

    def spoil(folder):
        path = folder / MANIFEST_FILE
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def lie(folder):
    """A header of another shape that fills the same bytes, and whose hash the manifest has."""
    path = shard_path(folder, FIRST_SHARD)
    content = path.read_bytes()
    assert b"[5, 2, 4, 4]" in content
    path.write_bytes(content.replace(b"[5, 2, 4, 4]", b"[5, 2, 2, 8]"))
    length = int.from_bytes(content[:8], "little")
    sha = hashlib.sha256(path.read_bytes()[: 8 + length]).hexdigest()
    edit(lambda manifest: manifest["buckets"][0]["shards"][0].update(header_sha256=sha))(folder)


@pytest.mark.parametrize(
    ("spoil", "named", "expected"),
    [
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "set", "has no manifest.json"),
        (lambda folder: folder.rename(folder.with_name("gone")), "set", "there is no such folder"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("{"), MANIFEST_FILE, "is not JSON"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("[]"), MANIFEST_FILE, "is of format None"),
        (edit(lambda content: content.update(format=2)), MANIFEST_FILE, "is of format 2, this version reads format 1"),
        (edit(lambda content: content.pop("dtype")), MANIFEST_FILE, "dtype is missing"),
        (edit(lambda content: content.update(dtype="int3")), MANIFEST_FILE, "dtype 'int3'"),
        (edit(lambda content: content.update(samples=12)), MANIFEST_FILE, "do not add up"),
        (edit(lambda content: content["buckets"][1].update(samples=5)), MANIFEST_FILE, "bucket 64x96 has 4 samples"),
        (edit(lambda content: content["buckets"][0].update(latent=[2, 4])), MANIFEST_FILE, "is damaged"),
        (edit(lambda content: content.update(buckets=3)), MANIFEST_FILE, "is damaged"),
        (
            edit(lambda content: content["buckets"][0]["shards"][0].update(file="../one")),
            MANIFEST_FILE,
            "'../one' is no name of a file",
        ),
        (lambda folder: shard_path(folder, FIRST_SHARD).unlink(), FIRST_SHARD, "is missing"),
        (lambda folder: os.truncate(shard_path(folder, FIRST_SHARD), 900), FIRST_SHARD, "has 900 bytes, the manifest"),
        (lambda folder: flip(shard_path(folder, FIRST_SHARD), 20), FIRST_SHARD, "its header is not the one"),
        (lie, FIRST_SHARD, "latents is float32 [5, 2, 2, 8], the manifest says float32 [5, 2, 4, 4]"),
        (lambda folder: (folder / EMPTY_FILE).unlink(), EMPTY_FILE, "is missing"),
        (lambda folder: flip(folder / EMPTY_FILE, -1), EMPTY_FILE, "has changed"),
    ],
)
def test_what_has_changed_is_refused_by_name(spoil, named, expected, tmp_path):
    folder = tmp_path / "set"
    write_set(folder, COUNTS)
    open_manifest(folder)
    spoil(folder)
    with pytest.raises(ValueError) as refused:
        open_manifest(folder)
    assert named in str(refused.value)
    assert expected in str(refused.value)


def test_a_header_that_cannot_be_read_is_told_with_its_file(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is missing or cannot be read .Is a directory"):
        header_sha256(tmp_path)


def test_changed_content_is_seen_by_who_looks_for_it(tmp_path):
    folder = tmp_path / "set"
    write_set(folder, COUNTS)
    flip(shard_path(folder, FIRST_SHARD), -1)
    open_manifest(folder)
    with pytest.raises(ValueError, match=f"{FIRST_SHARD}: its content has changed"):
        open_manifest(folder, verify=True)


@pytest.mark.parametrize(
    ("name", "value", "call"),
    [
        ("caption_begin", [0, 2, 5], None),
        ("token_begin", [1, 2, 3, 4, 5], None),
        ("caption_begin", [0, -3, 4], lambda reader: reader.captions(0)),
        ("token_begin", [0, 9999, 2, 3, 8], lambda reader: reader.num_tokens(0)),
        ("key_begin", [0, 2], None),
    ],
)
def test_places_that_lead_nowhere_are_refused(name, value, call, tmp_path):
    path = tmp_path / "one.safetensors"
    write_shard(path, [make_sample(number, LATENT) for number in range(2)])
    tensors = load_file(path)
    value = torch.tensor(value)
    if call is not None:
        value[-1] = tensors[name][-1]  # only the middle is wrong
    save_file(tensors | {name: value}, path)
    with pytest.raises(ValueError, match="one.safetensors is damaged"):
        reader = ShardReader(path)
        assert call is not None, "opened"
        call(reader)


def test_a_shard_that_is_cut_short_under_the_reader_is_an_error(tmp_path):
    path = tmp_path / "one.safetensors"
    write_shard(path, [make_sample(number, LATENT) for number in range(200)])
    reader = ShardReader(path)
    reader.sample(199)
    begin = reader.entries["states"].begin
    os.truncate(path, begin + 8)
    with pytest.raises(ValueError, match="one.safetensors ends too early"):
        reader.read_states(0, memoryview(bytearray(1000)))


@pytest.mark.parametrize("what", ["labels", "states", "pooled"])
def test_what_a_shard_does_not_have_is_named(what, tmp_path):
    path = tmp_path / "one.safetensors"
    write_shard(path, [make_sample(0, LATENT, captions=0, classes=2) if what != "labels" else make_sample(0, LATENT)])
    reader = ShardReader(path)
    with pytest.raises(ValueError, match=f"one.safetensors has no {what}"):
        reader.label(0) if what == "labels" else reader.row_bytes(what)
