"""Encoding: the same bytes on any number of ranks and after any kills; each good sample once, each bad one reported."""

import dataclasses
import io
import json
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megadit.data import encode as encode_module
from megadit.data import encode_folder
from megadit.data.buckets import BucketRule
from megadit.data.encode import Lost, Silent, Tally
from megadit.data.encode_folder import EncodingFolder
from megadit.data.encode_unit import UnitEncoder
from megadit.data.manifest import open_manifest
from megadit.data.shards import read_empty
from megadit.runtime.launch import Meeting, Process
from tests.data.encodings import (
    CONFIG,
    Never,
    Pooled,
    encode_here,
    encode_with,
    files_of,
    quarantine_of,
    samples_of,
    stand_ins,
    tool_on,
    units_done,
)
from tests.data.planted import BAD, Planted, content, picture, plant, write_tar
from tests.ranks import run_ranks

COUNT = 288  # good samples of three tars


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars with 12 bad samples, and what should come of them."""
    folder, planted = tmp_path_factory.mktemp("encode") / "tars", Planted()
    folder.mkdir()
    kinds = [kind for kind in BAD if kind not in ("weights", "alone", "nothing")]
    pictures = [content(picture(n, 64 + 16 * (n % 5), 96 - 8 * (n % 3))) for n in range(40)]
    plant(folder / "a.tar", planted, 0, 96, kinds[:4], pictures, twice=True)
    plant(folder / "b.tar", planted, 96, 96, kinds[4:], pictures, torn=True)
    plant(folder / "c.tar", planted, 192, 96, (), pictures, cut=True)
    assert (len(planted.good), len(planted.bad)) == (COUNT, 12)
    return folder, planted


@pytest.fixture(scope="module")
def undisturbed(tars):
    out = tars[0].parent / "undisturbed"
    ((report, shown),) = encode_with(out, tars[0])
    return out, report, shown


def test_each_good_sample_is_there_once_and_each_bad_one_is_reported(tars, undisturbed):
    planted, (out, report, shown) = tars[1], undisturbed
    assert sorted(sample.key for sample in samples_of(out)) == sorted(f"tars/{key}" for key in planted.good)
    assert quarantine_of(out) == {f"tars/{key}": reason for key, reason in planted.bad.items()}
    assert report.samples == sum(report.buckets.values()) == COUNT == open_manifest(out).samples
    assert sum(report.bad.values()) == 12 == open_manifest(out).quarantined
    assert set(report.bad) == set(planted.bad.values())
    assert shown[0] == (0, COUNT + 12, 0)
    assert shown[-1] == (COUNT + 12, COUNT + 12, 0)
    assert [done for done, _, _ in shown] == sorted(done for done, _, _ in shown)
    assert set(report.buckets) == {"48x80", "64x64", "80x48"}


def test_a_sample_is_its_image_in_its_bucket_and_its_captions(tars, undisturbed):
    """Against Pillow and avg_pool2d, image by image."""
    pictures = [content(picture(n, 64 + 16 * (n % 5), 96 - 8 * (n % 3))) for n in range(40)]
    for sample in list(samples_of(undisturbed[0]))[::7]:
        number = int(sample.key[-6:])
        image = Image.open(io.BytesIO(pictures[number % 40]))
        height, width = (8 * size for size in sample.latents_CHW.shape[1:])
        scale = max(height / image.height, width / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 127.5 - 1
        expected = pixels.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3)).transpose(2, 0, 1)
        assert np.abs(sample.latents_CHW.numpy() - expected).max() < 1 / 127.5
        texts = [f"a photo of tree {number}"] if number % 7 else [f"a red cat {number}", "an animal"]
        assert [caption.weight for caption in sample.captions] == ([1.0] if number % 7 else [3.0, 1.0])
        for caption, text in zip(sample.captions, texts, strict=True):
            letters = [*map(ord, text[:11]), 0]
            assert caption.states_LC.tolist() == [[letter, letter] for letter in letters], "without padding"
            assert caption.pooled_P.tolist() == [len(text)]
        assert sample.label is None


def test_the_manifest_says_what_made_the_set(undisturbed):
    out, report, _ = undisturbed
    manifest = open_manifest(out)
    assert (manifest.dtype, manifest.latents, manifest.text_kind) == ("float32", "mean", "clip")
    assert manifest.autoencoder == {"name": "pooled", "fingerprint": "0"}
    assert manifest.text == ({"kind": "clip", "name": "letters", "length": 12},)
    assert manifest.resolutions == {"resolutions": [64], "multiple": 16, "max_aspect": 2.0, "square": False}
    assert json.loads((out / "encoding.json").read_bytes())["settings"]["device"] == "cpu"
    empty = read_empty(out)
    assert (empty.states_LC.tolist(), empty.pooled_P.tolist()) == ([[0.0, 0.0]], [0.0])
    assert report.captions == manifest.captions
    numbers = [number for number in range(COUNT)]
    cut = [f"a red cat {n}" for n in numbers if n % 7 == 0] + [f"a photo of tree {n}" for n in numbers if n % 7]
    assert report.cut == {"clip": sum(len(text) >= 12 for text in cut)}


@pytest.mark.parametrize(("world_size", "threads"), [(2, 1), (3, 4)])
def test_any_number_of_ranks_and_threads_makes_the_same_bytes(world_size, threads, tars, undisturbed, tmp_path):
    told = encode_with(tmp_path / "out", tars[0], world_size=world_size, threads=threads)
    assert [report for report, _ in told] == [undisturbed[1]] * world_size
    assert told[0][1][-1] == (COUNT + 12, COUNT + 12, 0)
    assert [shown for _, shown in told[1:]] == [[]] * (world_size - 1), "rank 0 alone speaks"
    assert files_of(tmp_path / "out") == files_of(undisturbed[0])


COMMAND = ["--autoencoder", "stand-in", "--resolution", 64, "--min-size", 48, "--unit", 25, "--batch", 4,
           "--dtype", "float32", "--seed", 0]  # fmt: skip


def test_killed_three_times_it_makes_the_same_bytes(tars, undisturbed, tmp_path):
    """On two ranks, then one, then two, then one."""
    out = tmp_path / "out"
    for world_size, after in ((2, 1), (1, 5), (2, 8)):
        tool_on(world_size, tars[0], "--out", out, *COMMAND, when=lambda after=after: units_done(out) >= after)
        assert after <= units_done(out) < 13
        assert not (out / "manifest.json").exists()
        with pytest.raises(ValueError, match="its encoding is not finished"):
            open_manifest(out)
    ((status, output, errors),) = tool_on(1, tars[0], "--out", out, *COMMAND)
    assert status == 0, errors
    assert f"{COUNT} samples" in output
    assert files_of(out) == files_of(undisturbed[0])


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_a_signal_to_any_rank_stops_all_and_the_rest_is_done_later(victims, tars, undisturbed, tmp_path):
    out = tmp_path / "out"
    said = tool_on(
        2, tars[0], "--out", out, *COMMAND, when=lambda: units_done(out) >= 2, number=signal.SIGTERM, victims=victims
    )
    assert [status for status, _, _ in said] == [75, 75]
    assert "asked by SIGTERM; the same command goes on" in said[0][2]
    done = units_done(out)
    assert 2 <= done < 13
    ((report, shown),) = encode_with(out, tars[0])
    assert shown[0][0] == shown[0][2] >= 25 * (done - 3), "what is done is not done again"
    assert report == undisturbed[1]
    assert files_of(out) == files_of(undisturbed[0])


def begun(tars, undisturbed, tmp_path):
    """A copy of the finished folder as if it had been killed just before its end."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    for name in ("manifest.json", "quarantine.jsonl", "empty.safetensors"):
        (out / name).unlink()
    return out


def test_what_a_kill_leaves_is_removed_and_what_is_lost_is_made_again(tars, undisturbed, tmp_path):
    out = begun(tars, undisturbed, tmp_path)
    (out / "units" / "00000003.json").unlink()  # its shards are orphans
    (out / "shards" / "00000003_16x16.safetensors").write_bytes(b"orphan")
    (out / "shards" / "00000004_64x64.safetensors.new").write_bytes(b"partial")
    (out / "units" / "00000005.json.new").write_bytes(b"{")
    (out / "units" / "00000006.json").write_bytes(b'{"shards": [')
    sorted((out / "shards").glob("00000008_*"))[0].unlink()
    shard = sorted((out / "shards").glob("00000009_*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    ((_, shown),) = encode_with(out, tars[0])
    total = COUNT + 12
    lost = sum(json.loads((undisturbed[0] / "units" / f"{n:08d}.json").read_bytes())["count"] for n in (3, 6, 8, 9))
    assert shown[0] == (total - lost, total, total - lost)
    assert files_of(out) == files_of(undisturbed[0])


def test_a_folder_whose_beginning_was_cut_short_is_begun_again(tmp_path, monkeypatch):
    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_folder, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        EncodingFolder(tmp_path / "out").begin({}, [])
    assert EncodingFolder(tmp_path / "out").begun({}) is None


@pytest.mark.parametrize("name", ["encoding.json", "quarantine.jsonl"])
def test_a_full_disk_at_the_beginning_or_the_end_loses_no_rank(name, tmp_path):
    """/dev/full has no room for anything."""
    out = tmp_path / "out"
    told = {"a": {"caption": "a cat"}, "b": {"caption": " "}}
    tar = small_tar(tmp_path / "x.tar", {"a": picture(0, 64, 64), "b": picture(1, 64, 64)}, told)
    out.mkdir()
    if name == "quarantine.jsonl":
        encode_with(out, tar)
        (out / "manifest.json").unlink()
    (out / f"{name}.new").symlink_to("/dev/full")
    for status, output, errors in tool_on(2, tar, "--out", out, *COMMAND):
        assert (status, output) == (76, ""), errors
        assert "No space left on device; the same command goes on" in errors
    (out / f"{name}.new").unlink()
    assert tool_on(1, tar, "--out", out, *COMMAND)[0][0] == 0
    assert (open_manifest(out, verify=True).samples, len(quarantine_of(out))) == (1, 1)


class Asked(Never):
    """To stop, once a file is there."""

    def __init__(self, path):
        self.path = path

    @property
    def reason(self):
        return "asked" if self.path.exists() else None


def fail_here(rank, world_size, store, tar, out, kind):
    """Rank 1 fails while rank 0 stops. The error of each."""
    asked = Path(out).with_name("asked")

    def fail(*_):
        asked.write_text("")
        time.sleep(1)
        raise {"value": ValueError, "runtime": RuntimeError}[kind]("an encoder that fails")

    stops, encode = (Never(), fail) if rank else (Asked(asked), Pooled.encode)
    with mock.patch.object(Pooled, "encode", encode), pytest.raises(Exception) as caught:
        encode_here(rank, world_size, store, [tar], out, CONFIG, ("clip",), 1, stops)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("kind", ["value", "runtime"])
def test_a_rank_that_fails_while_another_stops_keeps_nobody_waiting(kind, tars, tmp_path):
    told = run_ranks(fail_here, 2, str(tmp_path / "store"), str(tars[0]), str(tmp_path / "out"), kind)
    assert told == [
        (Lost, "process 1 failed: an encoder that fails"),
        (Lost if kind == "value" else RuntimeError, "an encoder that fails"),
    ]


def test_a_rank_that_says_nothing_is_given_up_by_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "SILENCE_S", 0.2)
    meeting = Meeting(lambda: dist.FileStore(str(tmp_path / "store"), 3))
    one, other = (Tally(Process(rank, 3, rank, torch.device("cpu"), meeting), Never()) for rank in range(2))
    with pytest.raises(Silent, match="no image for 0 seconds, and not every process is through"):
        one.wait_for_all(lambda: None)
    with pytest.raises(Silent, match="no image for 0 seconds"):
        other.heed()


def test_a_finished_set_is_left_as_it_is(undisturbed, tars):
    before = {path: path.stat().st_mtime_ns for path in undisturbed[0].rglob("*") if path.is_file()}
    ((report, shown),) = encode_with(undisturbed[0], tars[0])
    assert (report, shown) == (undisturbed[1], [])
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed[0].rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": torch.bfloat16}, r"begun with dtype=float32; this asks for dtype=bfloat16; ask for that"),
        ({"batch": 5, "latents": "sample"}, r"begun with latents=mean, batch=4; this asks for latents=sample, batch=5"),
        ({"rule": BucketRule((64, 128), 16)}, r"buckets resolutions 1=none; this asks for buckets resolutions 1=128"),
    ],
)
def test_other_settings_are_refused_with_both_named(changes, told, tars, undisturbed):
    before = files_of(undisturbed[0])
    for world_size in (1, 2):
        with pytest.raises(ValueError, match=told):
            encode_with(undisturbed[0], tars[0], config=dataclasses.replace(CONFIG, **changes), world_size=world_size)
    assert files_of(undisturbed[0]) == before


def test_other_encoders_and_sources_are_refused_with_both_named(tars, undisturbed, tmp_path):
    with pytest.raises(ValueError, match=r"text 0 kind=clip.*; this asks for text 0 kind=t5"):
        encode_with(undisturbed[0], tars[0], text=("t5",))
    with pytest.raises(ValueError, match=r"source tars/b.tar=tar, \d+ bytes.*; this asks for source .*b.tar=none"):
        encode_with(undisturbed[0], tars[0] / "a.tar", tars[0] / "c.tar")
    shutil.copytree(tars[0], tmp_path / "tars")
    with (tmp_path / "tars" / "b.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"source tars/b.tar=tar, (\d+) bytes; this asks for source tars/b.tar=tar, "):
        encode_with(undisturbed[0], tmp_path / "tars")


def test_a_folder_of_something_else_is_left_alone(tars, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds something else, such as thesis.tex; choose another folder"):
        encode_with(tmp_path / "out", tars[0])
    assert list(files_of(tmp_path / "out")) == ["thesis.tex"]


def test_a_folder_in_use_is_refused_and_names_who_uses_it(tars, tmp_path):
    from megadit.runtime.lock import hold

    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out" / "lock", 0), pytest.raises(ValueError, match=r"out is in use by process \d+"):
        encode_with(tmp_path / "out", tars[0])


def small_tar(path, images, captions=None):
    """Images under keys, each with a caption of its own."""
    members = []
    for key, image in images.items():
        caption = json.dumps({"caption": f"of {key}"} if captions is None else captions[key]).encode()
        members += [(f"{key}.png", content(image, "PNG")), (f"{key}.json", caption)]
    write_tar(path, members)
    return path


def test_a_sample_of_the_posterior_follows_from_the_key_alone(tmp_path):
    images = {f"{n}": picture(n % 2, 64, 64) for n in range(6)}
    config = dataclasses.replace(CONFIG, latents="sample")
    found = []
    for name, order, batch, seed in (("a", 1, 4, 0), ("b", -1, 3, 0), ("c", 1, 4, 1)):
        (tmp_path / name).mkdir()
        tar = small_tar(tmp_path / name / "x.tar", dict(list(images.items())[::order]))
        encode_with(tmp_path / name / "out", tar, config=dataclasses.replace(config, batch=batch, seed=seed))
        found.append({sample.key: sample.latents_CHW for sample in samples_of(tmp_path / name / "out")})
    for key, latents in found[0].items():  # order and batches do not matter
        torch.testing.assert_close(found[1][key], latents, rtol=0, atol=1e-6)
    assert not any(found[0][key].equal(found[2][key]) for key in found[0]), "the seed does"
    same_image = [found[0][f"x.tar/{n}"] for n in (0, 2, 4)]
    assert not same_image[0].equal(same_image[1]) and not same_image[1].equal(same_image[2])


def test_latents_that_are_not_finite_are_left_out(tmp_path):
    images = {"good": picture(0, 64, 64), "black": Image.new("RGB", (64, 64)), "last": picture(1, 64, 64)}
    encode_with(tmp_path / "out", small_tar(tmp_path / "x.tar", images))
    assert [sample.key for sample in samples_of(tmp_path / "out")] == ["x.tar/good", "x.tar/last"]
    assert quarantine_of(tmp_path / "out") == {"x.tar/black": "not finite latents"}


def test_without_text_a_sample_is_known_by_its_label(tmp_path):
    images = {f"{n}": picture(n, 64, 64) for n in range(4)}
    told = {"0": {"label": 3}, "1": {"label": 0, "caption": "ignored"}, "2": {"caption": "no label"}, "3": {"label": 3}}
    ((report, _),) = encode_with(tmp_path / "out", small_tar(tmp_path / "x.tar", images, told), text=())
    assert [(s.key, s.label, len(s.captions)) for s in samples_of(tmp_path / "out")] == [
        ("x.tar/0", 3, 0), ("x.tar/1", 0, 0), ("x.tar/3", 3, 0)
    ]  # fmt: skip
    assert quarantine_of(tmp_path / "out") == {"x.tar/2": "no label"}
    manifest = open_manifest(tmp_path / "out")
    assert (manifest.text_kind, manifest.text, manifest.captions, manifest.classes) == ("none", (), 0, 4)
    assert not (tmp_path / "out" / "empty.safetensors").exists()
    assert report.cut == {}


def test_of_both_encoders_states_are_t5s_and_pooled_vectors_clips(tmp_path):
    tar = small_tar(tmp_path / "x.tar", {"a": picture(0, 64, 64)}, {"a": {"captions": ["one", "", "three"]}})
    config = dataclasses.replace(CONFIG, dtype=torch.bfloat16)
    encode_with(tmp_path / "out", tar, text=("t5", "clip"), config=config)
    (sample,) = samples_of(tmp_path / "out")
    assert [caption.pooled_P.tolist() for caption in sample.captions] == [[3.0], [5.0]], "without the blank one"
    assert sample.captions[0].states_LC.tolist() == [[ord(letter)] * 2 for letter in "one\0"]
    assert {sample.latents_CHW.dtype, sample.captions[0].states_LC.dtype} == {torch.bfloat16}
    assert open_manifest(tmp_path / "out").text_kind == "t5+clip"


def test_an_encoder_has_pillow_open_what_it_is_to_encode(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    config = dataclasses.replace(CONFIG, max_pixels=10**9)
    with UnitEncoder(stand_ins(), config, torch.device("cpu"), 1):
        assert Image.MAX_IMAGE_PIXELS == 10**9


def test_a_set_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path):
    write_tar(
        tmp_path / "x.tar", [("1.jpg", b"no"), ("1.txt", b"a"), ("2.jpg", b"no"), ("3.jpg", b"no"), ("3.txt", b"c")]
    )
    for _ in range(2):  # again when it is called again
        with pytest.raises(ValueError, match="no sample is left of 3: 2 not an image, 1 no caption; see"):
            encode_with(tmp_path / "out", tmp_path / "x.tar")
    assert len(quarantine_of(tmp_path / "out")) == 3
    write_tar(tmp_path / "y.tar", [])
    with pytest.raises(ValueError, match="no samples in .*y.tar"):
        encode_with(tmp_path / "none", tmp_path / "y.tar")
