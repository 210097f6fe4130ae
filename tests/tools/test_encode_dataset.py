"""The command that encodes a data set: with real encoders, under torchrun, and what it refuses."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megadit.data.manifest import open_manifest
from tests.commands import run_python
from tests.data.encodings import files_of, quarantine_of, samples_of, tool_on, units_done
from tests.data.planted import BAD, Planted, content, picture, plant, write_tar
from tools import encode_dataset
from tools.tiny_encoders import make_autoencoder, make_clip, make_t5

TOOL = "tools/encode_dataset.py"
ENVIRON = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def encode(*argv):
    return run_python(TOOL, *argv, env=ENVIRON)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Encoders, and a tar of ten pictures that are not all of one shape."""
    folder = tmp_path_factory.mktemp("encode_dataset")
    make_autoencoder(folder / "vae", channels=8, downscale=4, shift_factor=0.1, scaling_factor=0.3)
    make_t5(folder / "t5")
    make_clip(folder / "clip")
    members = []
    for n in range(10):
        members += [(f"{n}.png", content(picture(n, 64, 64 if n % 2 else 96), "PNG"))]
        members += [(f"{n}.txt", ("a red cat " * (1 + 30 * (n == 3))).encode())]
        members += [(f"{n}.json", b'{"label": 1}')]
    write_tar(folder / "a.tar", members)
    return folder


def test_latents_and_states_are_those_of_diffusers_and_transformers(made):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    encoders = ["--autoencoder", made / "vae", "--t5", made / "t5", "--clip", made / "clip", "--text-length", 20]
    done = encode(made / "a.tar", "--out", made / "out", *encoders, "--resolution", 64, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == [
        f"{made / 'out'}: 10 samples, 10 captions, 0 samples left out",
        f"{5:12} of 48x80",
        f"{5:12} of 64x64",
    ]
    assert done.stdout.splitlines()[3:] == [f"{1:12} captions cut for t5", f"{1:12} captions cut for clip"]
    vae = AutoencoderKL.from_pretrained(made / "vae").eval()
    t5, clip = (
        T5EncoderModel.from_pretrained(made / "t5").eval(),
        CLIPTextModelWithProjection.from_pretrained(made / "clip").eval(),
    )
    t5_tokenizer = T5Tokenizer.from_pretrained(made / "t5")
    clip_tokenizer = CLIPTokenizer.from_pretrained(made / "clip")
    seen = 0
    for sample in samples_of(made / "out"):
        number = int(sample.key.rpartition("/")[2])
        text = "a red cat " * (1 + 30 * (number == 3))
        if number % 2:
            pixels = torch.from_numpy(np.array(picture(number, 64, 64))).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                expected = (vae.encode(pixels).latent_dist.mode() - 0.1) * 0.3
            torch.testing.assert_close(sample.latents_CHW[None], expected, atol=1e-6, rtol=1e-6)
        with torch.no_grad():
            ids = t5_tokenizer(text.strip(), truncation=True, max_length=20, return_tensors="pt")
            states = t5(**ids).last_hidden_state
            ids = clip_tokenizer(text.strip(), truncation=True, max_length=77, return_tensors="pt")
            pooled = clip(**ids).text_embeds
        (caption,) = sample.captions
        torch.testing.assert_close(caption.states_LC[None], states, atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(caption.pooled_P[None], pooled, atol=2e-6, rtol=1e-6)
        seen += 1
    assert seen == 10
    manifest = open_manifest(made / "out")
    assert manifest.autoencoder["name"] == str(made / "vae")
    assert [each["kind"] for each in manifest.text] == ["t5", "clip"]


@pytest.mark.slow
def test_torchrun_makes_the_same_bytes_and_verify_reads_them(made, tmp_path):
    argv = [made / "a.tar", "--autoencoder", "pixels", "--resolution", 64, "--unit", 2]
    ((status, output, errors),) = tool_on(1, *argv, "--out", tmp_path / "alone", with_stand_ins=False)
    assert status == 0, errors
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [str(word) for word in (*torchrun, TOOL, *argv, "--out", tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "two") == files_of(tmp_path / "alone")
    assert done.stdout.replace("two", "alone") == output
    good = tool_on(1, "--verify", "--out", tmp_path / "two")[0]
    assert good == (0, f"good: {tmp_path / 'two'}, 10 samples\n", "")
    shard = sorted((tmp_path / "two" / "shards").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, output, _ = tool_on(1, "--verify", "--out", tmp_path / "two")[0]
    assert status == 2
    assert output.startswith(f"bad: {shard}: its content has changed since it was written")


def test_what_is_refused_is_said_once_and_writes_nothing(made, tmp_path):
    out = tmp_path / "out"
    pixels = ["--out", out, "--autoencoder", "pixels"]
    for argv, told in (
        (["--out", out, "--autoencoder", "pixels"], "no sources: name tars"),
        ([made / "a.tar", "--out", out], "--autoencoder is missing"),
        ([tmp_path / "none.tar", *pixels], "none.tar: there is no such file"),
        ([made / "a.tar", *pixels, "--resolution", "251"], "resolution 251 is not a multiple of 2"),
        ([made / "a.tar", *pixels, "--patch", "3"], "resolution 256 is not a multiple of 3, the pixels of a patch"),
        ([made / "a.tar", *pixels, "--column", "picture=x"], "--column picture=x: write WHAT=NAME, WHAT one of image"),
        ([made / "a.tar", *pixels, "--device", "cuda"], "--device cuda, but torch sees no CUDA device here"),
        ([made / "a.tar", "--out", out, "--autoencoder", tmp_path / "vae"], "vae"),
    ):
        (status, output, errors), other = tool_on(2, *argv, with_stand_ins=False)
        assert (status, output, other) == (2, "", (2, "", "")), errors
        assert errors.startswith("encode_dataset: ") and told in errors
        assert not out.exists()


def test_help_shows_how_to_start_it():
    done = encode("--help")
    assert done.returncode == 0
    for words in ("torchrun --nproc-per-node", "captions.jsonl", "quarantine.jsonl", "--verify", "--latents"):
        assert words in done.stdout


def test_a_rank_that_fails_ends_the_others_and_the_rest_is_done_later(made, tmp_path):
    """The disk of one rank fails: here, its tar is gone while it reads it."""
    out = tmp_path / "out"
    (tmp_path / "tars").mkdir()
    for name in "ab":
        plant(tmp_path / "tars" / f"{name}.tar", Planted(), 0, 150, pictures=[content(picture(0, 64, 64))])
    argv = [tmp_path / "tars", "--out", out, "--autoencoder", "x", "--resolution", 64, "--unit", 50, "--batch", 4]
    gone = tmp_path / "b.tar"
    (tmp_path / "tars" / "b.tar").rename(gone)
    (tmp_path / "tars" / "b.tar").symlink_to(gone)

    def when():
        if units_done(out) < 1:
            return False
        gone.unlink(missing_ok=True)
        return True

    said = tool_on(2, *argv, when=when, number=signal.SIGCONT)
    assert [status for status, _, _ in said] == [76, 76], said
    assert any("b.tar" in errors and "No such file" in errors for _, _, errors in said)
    plant(gone, Planted(), 0, 150, pictures=[content(picture(0, 64, 64))])
    assert tool_on(1, *argv)[0][0] == 0
    assert open_manifest(out, verify=True).samples == 300


def test_what_nobody_expected_is_shown_and_can_go_on(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(encode_dataset, "run", fail)
    assert encode_dataset.attempt(None, SimpleNamespace(rank=1, is_main=False), None) == 76
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "RuntimeError: CUDA out of memory" in errors
    assert errors.endswith("encode_dataset: process 1 failed; the same command goes on\n")


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_twenty_thousand_images_killed_three_times(tmp_path, monkeypatch):
    """256-pixel JPEGs and 60 bad samples, an AutoencoderKL and a CLIP, two ranks that are killed at random moments."""
    monkeypatch.setattr("tests.ranks.TIME_LIMIT", 1800)
    planted, bad = Planted(), list(BAD) * 4
    pictures = [content(picture(n), quality=70 + n % 25) for n in range(500)]
    (tmp_path / "tars").mkdir()
    for t in range(20):
        plant(tmp_path / "tars" / f"{t:05d}.tar", planted, 1000 * t, 1000, bad[t::20], pictures,
              twice=t in range(4), torn=t in range(4, 8), cut=t in range(8, 12))  # fmt: skip
    assert (len(planted.good), len(planted.bad)) == (20_000, 60)
    make_autoencoder(tmp_path / "vae", downscale=8, width=4, layers=0)
    make_clip(tmp_path / "clip")
    argv = [*sorted((tmp_path / "tars").iterdir()), "--autoencoder", tmp_path / "vae", "--clip", tmp_path / "clip",
            "--dtype", "float32", "--latents", "sample", "--unit", 250, "--threads", 1,
            "--resolution", 128]  # fmt: skip
    began = time.monotonic()
    for status, _, errors in encode_all(argv, tmp_path / "undisturbed"):
        assert status == 0, errors
    seconds = time.monotonic() - began
    draw, out, killed = random.Random(), tmp_path / "killed", []
    for least in sorted(draw.sample(range(1, 76), 3)):
        encode_all(argv, out, Moment(out, least, draw.random()))
        killed.append(units_done(out))
        assert not (out / "manifest.json").exists()
    for status, _, errors in encode_all(argv, out):
        assert status == 0, errors
    sys.stderr.write(
        f"20,060 images: {seconds:.0f} s, {20_060 / seconds:.0f} a second; killed with {killed} of 100 units done: "
        f"{time.monotonic() - began - seconds:.0f} s\n"
    )
    assert sorted(sample.key for sample in samples_of(out)) == sorted(planted.good)
    assert quarantine_of(out) == planted.bad
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path)


class Moment:
    """True once so many units are done, and so many seconds later."""

    def __init__(self, out, least, delay):
        self.out, self.least, self.delay, self.begin = out, least, delay, None

    def __call__(self):
        if self.begin is None and units_done(self.out) >= self.least:
            self.begin = time.monotonic()
        return self.begin is not None and time.monotonic() >= self.begin + self.delay


def encode_all(argv, out, when=None):
    return tool_on(2, *argv, "--out", out, when=when, with_stand_ins=False)
