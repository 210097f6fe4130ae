"""Latents and pixels against diffusers' AutoencoderKL called directly, and what is refused."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from megadit.encoders.autoencoder import Autoencoder
from tools import tiny_encoders as tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Latent channels, scaling and shift of Stable Diffusion, one between, and FLUX; the last without the two convolutions.
PUBLISHED = {
    "4": {"channels": 4, "downscale": 2},
    "8": {"channels": 8, "downscale": 4, "scaling_factor": 0.41407, "shift_factor": -0.2},
    "16": {
        "channels": 16,
        "downscale": 8,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
CLOSE = {"rtol": 0, "atol": 1e-6}  # of networks in float64, whose outputs are rounded to float32


def pixels(count=3, height=48, width=32, seed=5):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def load(folder, dtype=torch.float64):
    return Autoencoder.load(str(folder), "cpu", dtype)


def weights_of(ours):
    return {name: tensor.clone() for name, tensor in ours.network.state_dict().items()}


def assert_same_weights(found, expected):
    """Bit for bit. What is computed with them is not: kernels round by how a tensor is aligned, and a tensor is used
    where its file has it."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module", params=PUBLISHED)
def pair(request, tmp_path_factory):
    """(ours, diffusers' own, its config)."""
    folder = tmp_path_factory.mktemp("vae")
    tiny.make_autoencoder(folder, attention=True, **PUBLISHED[request.param])
    theirs = AutoencoderKL.from_pretrained(folder).double().eval()
    return load(folder), theirs, theirs.config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_autoencoder(tmp_path_factory.mktemp("vae"))


def posterior_of(theirs, images):
    """In float32, as noise is drawn in the posterior's precision."""
    posterior = theirs.encode(images.double()).latent_dist
    return type(posterior)(posterior.parameters.float())


@torch.no_grad()
def test_latents_are_the_posteriors_mean_shifted_and_scaled(pair):
    ours, theirs, config = pair
    images = pixels()
    mean = posterior_of(theirs, images).mean
    assert mean.std() > 0.05, "or anything is close"
    latents = ours.encode(images)
    torch.testing.assert_close(latents, (mean - (config.shift_factor or 0)) * config.scaling_factor, **CLOSE)
    assert latents.shape == (3, ours.channels, 48 // ours.downscale, 32 // ours.downscale)
    assert latents.is_contiguous() and not latents.requires_grad


@torch.no_grad()
def test_a_sample_is_theirs_with_the_same_generators(pair):
    ours, theirs, config = pair
    images = pixels()
    z = posterior_of(theirs, images).sample([torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
    latents = ours.encode(images, [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
    torch.testing.assert_close(latents, (z - (config.shift_factor or 0)) * config.scaling_factor, **CLOSE)
    assert (latents - ours.encode(images)).abs().mean() > 0.1


def test_an_images_sample_does_not_depend_on_its_batch(pair):
    ours, _, _ = pair
    images = pixels()
    together = ours.encode(images, [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
    alone = ours.encode(images[1:2], [torch.Generator().manual_seed(2)])
    torch.testing.assert_close(together[1:2], alone, **CLOSE)


@torch.no_grad()
def test_pixels_are_theirs_of_latents_without_scale_and_shift(pair):
    ours, theirs, config = pair
    latents = ours.encode(pixels())
    z = latents / config.scaling_factor + (config.shift_factor or 0)
    expected = theirs.decode(z.double()).sample.float()
    assert (expected.abs() < 1).float().mean() > 0.9, "or clipping hides a difference"
    decoded = ours.decode(latents)
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), **CLOSE)
    assert decoded.shape == (3, 3, 48, 32) and decoded.std() > 0.05


def test_decoded_pixels_stay_in_range(folder):
    decoded = load(folder).decode(1e3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert decoded.min() == -1 and decoded.max() == 1


def test_identity_says_what_it_is(pair):
    ours, _, config = pair
    identity = dict(ours.identity)
    assert len(identity.pop("fingerprint")) == 16
    assert identity.pop("name")
    assert identity == {
        "revision": "",
        "class": "AutoencoderKL",
        "channels": config.latent_channels,
        "downscale": ours.downscale,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
    }
    assert json.loads(json.dumps(ours.identity)) == ours.identity


def test_another_weight_is_another_fingerprint(tmp_path, folder):
    tiny.make_autoencoder(tmp_path)
    assert load(tmp_path).identity["fingerprint"] == load(folder).identity["fingerprint"], "of content, not of place"
    weights = load_file(tmp_path / WEIGHTS)
    weights["encoder.conv_in.bias"][0] += 1e-3
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    assert load(tmp_path).identity["fingerprint"] != load(folder).identity["fingerprint"]


def test_nothing_trains(folder):
    """Nor where the network was about to."""
    network = Autoencoder(AutoencoderKL.from_pretrained(folder).train(), {}).network
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_latents_of_bfloat16_are_float32_and_near(folder):
    ours = load(folder, torch.bfloat16)
    assert ours.network.dtype == torch.bfloat16
    images = pixels()
    latents, exact = ours.encode(images), load(folder).encode(images)
    assert latents.dtype == torch.float32 and ours.decode(latents).dtype == torch.float32
    assert 0 < (latents - exact).abs().max() < 0.05 * exact.std() + 0.02 * exact.abs().max()


def test_noise_is_drawn_in_float32_whatever_the_networks_precision(folder):
    """So a sample of bfloat16's posterior is not a multiple of bfloat16's steps."""
    latents = load(folder, torch.bfloat16).encode(pixels(), [torch.Generator().manual_seed(i) for i in range(3)])
    z = latents / 0.18215
    assert (z != z.bfloat16().float()).float().mean() > 0.9


def test_a_pipelines_folder_holds_it_in_vae(tmp_path, folder):
    tiny.make_autoencoder(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    ours = load(tmp_path)
    assert_same_weights(weights_of(ours), weights_of(load(folder)))
    torch.testing.assert_close(ours.encode(pixels()), load(folder).encode(pixels()), **CLOSE)
    assert ours.identity == load(folder).identity | {"name": str(tmp_path)}


def test_weights_may_be_in_several_files(tmp_path, folder):
    AutoencoderKL.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(weights_of(load(tmp_path)), weights_of(load(folder)))
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost} is missing: .*index.json lists it"):
        load(tmp_path)


@torch.no_grad()
def test_names_of_older_files_are_understood(tmp_path):
    """The attention of Stable Diffusion's published autoencoders is called query, key, value and proj_attn."""
    tiny.make_autoencoder(tmp_path, attention=True)
    ours = load(tmp_path)
    weights, latents = weights_of(ours), ours.encode(pixels())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        for new, older in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{older}.")
        renamed[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in renamed
    save_file(renamed, tmp_path / WEIGHTS, {"format": "pt"})
    again = load(tmp_path)
    assert_same_weights(weights_of(again), weights)
    torch.testing.assert_close(again.encode(pixels()), latents, **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(47, 32), (48, 33), (1, 1)])
def test_a_size_that_downscale_does_not_divide_is_refused(folder, height, width):
    with pytest.raises(ValueError, match=f"an image of {height} x {width} pixels .* must be multiples of 2"):
        load(folder).encode(pixels(1, height, width))


def test_what_is_no_image_or_no_latent_is_refused(folder):
    ours = load(folder)
    with pytest.raises(ValueError, match=r"pixels \[1, 1, 8, 8\] are not \[images, 3, height, width\]"):
        ours.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"latents \[1, 16, 8, 8\] do not fit .* \[images, 4, height, width\]"):
        ours.decode(torch.zeros(1, 16, 8, 8))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "holds no AutoencoderKL: .*config.json is of AutoencoderTiny"),
        ({"scaling_factor": None}, "has no scaling_factor in its config.json"),
        ({"latents_mean": [0.0] * 4}, "sets latents_mean; only scaling_factor and shift_factor are applied"),
        (
            {"latent_channels": 8},
            "cannot be loaded as AutoencoderKL: RuntimeError: (.|\\n)*size mismatch",
        ),
        ({"block_out_channels": [8, 12]}, "cannot be loaded as AutoencoderKL: "),
        ({"mid_block_add_attention": True}, r"the weights in .* lack decoder\.mid_block\.attentions\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    tiny.make_autoencoder(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_gray_images_are_refused(tmp_path):
    tiny.make_autoencoder(tmp_path, in_channels=1, out_channels=1)
    with pytest.raises(ValueError, match="is not for RGB images: in_channels is 1, not 3"):
        load(tmp_path)


def test_float16_that_would_overflow_is_refused(tmp_path):
    tiny.make_autoencoder(tmp_path, force_upcast=True)
    with pytest.raises(ValueError, match="overflows in float16 .* take bfloat16 or float32"):
        load(tmp_path, torch.float16)
    assert load(tmp_path, torch.bfloat16).channels == 4


def test_a_damaged_file_is_named(tmp_path):
    tiny.make_autoencoder(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded as AutoencoderKL"):
        load(tmp_path)


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has neither config.json nor vae/config.json"):
        load(tmp_path)


def test_a_pickle_is_not_read(tmp_path):
    tiny.make_autoencoder(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin is a pickle, which is not read"):
        load(tmp_path)
