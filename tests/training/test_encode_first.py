"""data.kind=images: a run that encodes its images before its first step, and not again."""

import json
import shutil

import pytest
from PIL import Image

from megadit.data.manifest import open_manifest
from tests.ranks import train_on
from tools.tiny_encoders import make_autoencoder, make_t5

CONFIG = "tests/configs/tiny.yaml"
WIDTH = 32  # of T5's states


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    make_autoencoder(folder / "vae", downscale=8, width=4, layers=0, scaling_factor=4.0)
    make_t5(folder / "t5", width=WIDTH)
    return folder


def draw_images(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (64 if i % 2 else 96, 64), (i * 9 % 256, 80, 200)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a {('red', 'blue')[i % 2]} photo of a cat")


def settings(tmp_path, encoders):
    return [
        *("--config", CONFIG, "data.kind=images", f"data.path={tmp_path / 'images'}", f"run.dir={tmp_path / 'run'}"),
        *(f"data.autoencoder={encoders / 'vae'}", "text.kind=t5", f"text.t5={encoders / 't5'}", "data.resolution=64"),
        *("data.global_batch=8", "data.micro_batch=0", "data.heldout=4", "model.channels=4", "model.image_size=8"),
        *(f"text.channels={WIDTH}", "text.length=24", "data.small_buckets=drop"),
    ]


def test_images_are_encoded_once_and_then_trained_on(tmp_path, encoders):
    draw_images(tmp_path / "images", 40)
    argv = settings(tmp_path, encoders)
    ends = train_on(2, *argv, "run.steps=2")
    assert [status for status, _ in ends] == [0, 0], ends[0][1]
    manifest = open_manifest(tmp_path / "run" / "encoded", verify=True)
    assert manifest.samples == 40 and manifest.dtype == "float32"
    assert "kind: shards" in (tmp_path / "run" / "config.yaml").read_text()
    shutil.rmtree(tmp_path / "images")  # neither images nor encoders are needed any more
    ends = train_on(2, *argv, "run.steps=4")
    assert [status for status, _ in ends] == [0, 0], ends[0][1]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    ((status, errors),) = train_on(1, *argv, "run.steps=5", "data.resolution=32")
    assert status == 2 and "data.resolution=64 is now 32; choose another run.dir" in errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=", "data.kind=images encodes data.path"),
        ("data.autoencoder=", "data.kind=images needs data.autoencoder"),
        ("data.autoencoder=nowhere/vae", "nowhere/vae"),
        ("text.kind=precomputed", "text.kind=precomputed names no encoder for data.kind=images"),
        ("text.t5=", "text.kind=t5 needs text.t5"),
        ("model.channels=3", "makes latents of 4 channels; set model.channels=4"),
        ("text.channels=8", "makes states of 32 channels; set text.channels=32"),
        ("text.too_long=error", "text.too_long=error is not heeded by data.kind=images"),
        ("text.kind=builtin", "text.kind=builtin reads text, and data.kind=images has states"),
    ],
)
def test_what_cannot_be_encoded_is_refused(tmp_path, encoders, override, message):
    draw_images(tmp_path / "images", 2)
    ((status, errors),) = train_on(1, *settings(tmp_path, encoders), override)
    assert status == 2 and message in errors
    assert not (tmp_path / "run" / "encoded").exists()
