"""What decodes a run's latents: the autoencoder that is asked for, else the data's."""

from dataclasses import replace

import pytest
import torch

from megadit.training.config import RunConfig
from megadit.training.decoder import Decoder, named_autoencoder, open_decoder
from megadit.training.encoded import Named
from tools import tiny_encoders as tiny

CPU = torch.device("cpu")


def run_on(channels):
    run = RunConfig()
    return replace(run, model=replace(run.model, channels=channels), run=replace(run.run, dir="runs/x"))


def test_latents_are_decoded_one_by_one_and_sizes_are_in_pixels(tmp_path):
    tiny.make_autoencoder(tmp_path / "vae", channels=4, downscale=2)
    decoder = open_decoder(run_on(4), str(tmp_path / "vae"), CPU)
    assert (decoder.cell, decoder.name) == (2, str(tmp_path / "vae"))
    latents = torch.randn(3, 4, 4, 6)
    pixels = decoder.decode(latents)
    assert pixels.shape == (3, 3, 8, 12)
    assert torch.equal(pixels, torch.cat([decoder.decode(latent) for latent in latents.split(1)]))
    assert decoder.latent_size((8, 12), patch=2) == (4, 6) and decoder.latent_size(None, patch=2) is None
    with pytest.raises(ValueError, match="--size 6x8 must be multiples of 4 pixels"):
        decoder.latent_size((6, 8), patch=2)


def test_an_autoencoder_of_other_latents_is_refused(tmp_path):
    tiny.make_autoencoder(tmp_path / "vae", channels=4, downscale=2)
    message = "vae has latents of 4 channels, the run runs/x draws 3; name the one .*: --autoencoder"
    with pytest.raises(ValueError, match=message):
        open_decoder(run_on(3), str(tmp_path / "vae"), CPU)


def test_latents_of_a_run_on_pixels_are_pixels():
    assert open_decoder(RunConfig(), None, CPU) == Decoder()
    pixels = torch.randn(2, 1, 4, 4)
    assert Decoder().decode(pixels) is pixels


def test_the_datas_is_taken_unless_another_is_named(tmp_path):
    run = RunConfig()
    named = replace(run, data=replace(run.data, autoencoder="vae", autoencoder_revision="main"))
    assert named_autoencoder(named, None) == Named("vae", "main")
    assert named_autoencoder(named, "other") == Named("other", "")
    gone = replace(run, data=replace(run.data, kind="shards", path=str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="gone.*; without it, name what decodes pictures with --autoencoder"):
        named_autoencoder(gone, None)
