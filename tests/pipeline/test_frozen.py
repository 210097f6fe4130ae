"""Pipelines with frozen text encoders and an autoencoder, small but in the format of published ones."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.encoders.autoencoder import Autoencoder
from megadit.pipeline import ECDiTPipeline
from tests.commands import run_python
from tests.conversion.made import make_run
from tests.data.encoded_sets import write_set
from tools.tiny_encoders import make_autoencoder, make_clip, make_t5

PROMPTS = ["a red cat", "a large house by the sea and a small dog with the coffee in the street"]
KINDS = {
    "t5+clip": ["text.kind=t5+clip", "text.channels=32", "text.pooled=24"],
    "t5": ["text.kind=t5", "text.channels=32"],
    "clip": ["text.kind=clip", "text.channels=32", "text.pooled=24"],
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    make_autoencoder(folder / "vae", channels=2, downscale=8, shift_factor=0.1, scaling_factor=0.8)
    make_t5(folder / "t5")
    make_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def made(request, encoders, tmp_path_factory):
    """(the encoders' folder, the kind, a pipeline of a run on a data set with latents of three sizes, the run)."""
    folder = tmp_path_factory.mktemp("frozen")
    write_set(folder / "set", {(64, 64): 40, (64, 96): 24, (96, 64): 17})
    named = [f"data.autoencoder={encoders / 'vae'}"]
    named += [f"text.{kind}={encoders / kind}" for kind in request.param.split("+")]
    make_run(
        folder / "run",
        *("run.dtype=float32", "zero.stage=1", "data.kind=shards", f"data.path={folder / 'set'}", "data.heldout=8"),
        *("model.channels=2", "model.patch=2", "model.image_size=4", "model.positions=rotary", "text.length=12"),
        *("data.global_batch=8", "data.micro_batch=4"),
        *(*KINDS[request.param], *named),
    )
    pipe = ECDiTPipeline.from_run(folder / "run")
    pipe.set_progress_bar_config(disable=True)
    return encoders, request.param, pipe, folder / "run"


def test_latents_are_decoded_by_the_autoencoder(made):
    encoders, _, pipe, _ = made
    latents = pipe(PROMPTS, generator=1, output_type="latent").images
    pixels = pipe(PROMPTS, generator=1, output_type="pt").images
    assert latents.shape == (2, 2, 4, 4) and pixels.shape == (2, 3, 32, 32)
    autoencoder = Autoencoder.load(str(encoders / "vae"), "cpu", torch.float32)
    for latent, image in zip(latents, pixels, strict=True):
        expected = (autoencoder.decode(latent[None]) / 2 + 0.5).clamp(0, 1)[0]
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    (picture, _) = pipe(PROMPTS, generator=1).images
    assert (picture.mode, picture.size) == ("RGB", (32, 32))
    assert np.abs(np.asarray(picture) - 255 * pixels[0].permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-4


def test_pictures_are_those_of_the_tool(made, tmp_path):
    pipe, run, out = made[2], made[3], tmp_path / "grid.png"
    argv = [run, *PROMPTS, "--zoom", 1, "--seed", 3, "--out", out, "--size", "32x48"]
    done = run_python("tools/sample.py", *argv)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(out))
    for i, picture in enumerate(pipe(PROMPTS, height=32, width=48, generator=3).images):
        assert np.array_equal(np.asarray(picture), pixels[1:33, 49 * i + 1 : 49 * i + 49])


def test_it_comes_back_from_disk_with_its_encoders(made, tmp_path):
    encoders, kind, pipe, _ = made
    pipe.save_pretrained(tmp_path / "saved")
    count = len(kind.split("+"))
    folders = {"transformer", "scheduler", "vae", "text_encoder", "tokenizer"}
    folders |= {"text_encoder_2", "tokenizer_2"} if count == 2 else set()
    assert {path.name for path in (tmp_path / "saved").iterdir()} == folders | {"model_index.json"}
    again = ECDiTPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.components.keys() == pipe.components.keys() and len(again.parts.text_encoders) == count
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            mine, theirs = part.state_dict(), again.components[name].state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), name
    negative = "the small"
    for output in ("latent", "pt"):
        ours, back = (
            each(PROMPTS, negative, generator=3, num_images_per_prompt=2, output_type=output).images
            for each in (pipe, again)
        )
        # Kernels round by how an encoder's weights are aligned, which are used where their file has them.
        torch.testing.assert_close(back, ours, rtol=0, atol=1e-5)
    assert (again.scheduler, again.parts.sizes) == (pipe.scheduler, pipe.parts.sizes)


def test_diffusers_and_transformers_read_what_is_saved(made, tmp_path):
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    encoders, kind, pipe, _ = made
    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    index = json.loads((saved / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    network = AutoencoderKL.from_pretrained(saved / "vae")
    original = AutoencoderKL.from_pretrained(encoders / "vae")
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), original.parameters(), strict=True))
    for number, family in zip(("", "_2"), kind.split("+"), strict=False):
        model = {"t5": T5EncoderModel, "clip": CLIPTextModelWithProjection}[family]
        assert index[f"text_encoder{number}"] == ["transformers", model.__name__]
        model.from_pretrained(saved / f"text_encoder{number}")
        theirs = AutoTokenizer.from_pretrained(saved / f"tokenizer{number}")
        assert theirs(PROMPTS).input_ids == pipe.components[f"tokenizer{number}"](PROMPTS).input_ids


def test_sizes_are_those_of_the_data(made, caplog):
    pipe = made[2]
    draw = {"num_inference_steps": 1, "output_type": "pt", "generator": 0}
    with caplog.at_level(logging.WARNING, logger="megadit"):
        assert pipe("a cat", height=48, width=32, **draw).images.shape == (1, 3, 48, 32)
        assert not caplog.records
        assert pipe("a cat", height=64, width=32, **draw).images.shape == (1, 3, 64, 32)
    assert caplog.records[0].getMessage() == (
        "the model was not trained on pictures of 64x32, but of 32x32, 32x48, 48x32; expect worse ones"
    )
    with pytest.raises(ValueError, match="height=40 must be a multiple of 16 pixels: a patch is 2 cells of 8"):
        pipe("a cat", height=40)


def test_it_moves_with_its_encoders(made, tmp_path):
    pipe = made[2]
    pipe.save_pretrained(tmp_path / "saved")
    again = ECDiTPipeline.from_pretrained(tmp_path / "saved", encoder_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert {encoder.network.dtype for encoder in again.parts.text_encoders} == {torch.bfloat16}
    draw = {"num_inference_steps": 1, "output_type": "pt", "generator": 0}
    before = again("a cat", **draw).images
    assert torch.equal(again.to("cpu")("a cat", **draw).images, before)


def test_parts_that_lack_are_named(made, tmp_path):
    _, kind, pipe, _ = made
    pipe.save_pretrained(tmp_path / "saved")
    last = "_2" if "+" in kind else ""
    family = kind.split("+")[-1]
    lacks = {
        f"text_encoder{last}": f"(holds no {family} encoder|has neither config.json nor text_encoder/config.json)",
        f"tokenizer{last}": f"tokenizer{last} has no tokenizer",
        "vae": "has neither config.json nor vae/config.json",
        "transformer": "transformer does not exist",
    }
    for part, message in lacks.items():
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tmp_path / "saved", broken)
        shutil.rmtree(broken / part)
        with pytest.raises(ValueError, match=message) as caught:
            ECDiTPipeline.from_pretrained(broken)
        assert str(broken) in str(caught.value)


def test_captions_of_an_unnamed_encoder_are_drawn_by_number_and_not_saved(tmp_path):
    write_set(tmp_path / "set", {(64, 64): 40})
    make_run(
        tmp_path / "run",
        *("data.kind=shards", f"data.path={tmp_path / 'set'}", "data.heldout=8", "data.global_batch=8"),
        *("model.channels=2", "model.patch=2", "model.image_size=4", "text.kind=precomputed", "text.channels=6"),
        *("text.length=6", f"data.autoencoder={tmp_path / 'vae'}"),
    )
    make_autoencoder(tmp_path / "vae", channels=2, downscale=8)
    # The data set names another autoencoder than this one, so it is asked for by hand.
    manifest = tmp_path / "set/manifest.json"
    manifest.write_text(manifest.read_text().replace('"vae"', json.dumps(str(tmp_path / "vae"))))
    pipe = ECDiTPipeline.from_run(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["0", 3], num_inference_steps=1, output_type="pt", generator=0).images.shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="prompt 'a cat' is not the number of a stored caption"):
        pipe("a cat")
    with pytest.raises(ValueError, match="text.kind=precomputed does not say which encoder reads captions"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
