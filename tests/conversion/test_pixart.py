"""PixArt as diffusers has it: the same outputs and gradients with its weights, and its weights back, bit for bit."""

import pytest
import torch

from megadit.conversion.diffusers import ARCHITECTURES
from megadit.model.config import PRESETS, ECDiTConfig
from megadit.model.ecdit import whole_model
from megadit.model.text import TextConfig
from tests.conversion.networks import (
    assert_same_gradients,
    numbers,
    our_config,
    our_network,
    their_network,
    there_and_back,
    times_of,
)

diffusers = pytest.importorskip("diffusers")
NAME = "PixArtTransformer2DModel"
STEPS = [999, 250, 1]


def size(heads, width, layers, sample_size, captions, **others):
    settings = {"num_attention_heads": heads, "attention_head_dim": width, "num_layers": layers}
    return settings | {
        "cross_attention_dim": heads * width,
        "sample_size": sample_size,
        "caption_channels": captions,
        **others,
    }


SIZES = {
    "small": size(4, 8, 3, 16, 20),
    "other_ends": size(2, 24, 2, 12, 48, in_channels=3, out_channels=None, patch_size=3, norm_eps=1e-4),
    "interpolated": size(3, 12, 4, 32, 10, interpolation_scale=2, in_channels=5, out_channels=5),
    "head_width_72": size(2, 72, 2, 128, 33, use_additional_conditions=False, norm_num_groups=8),
    "one_pixel_patches": size(2, 8, 1, 6, 7, patch_size=1, interpolation_scale=0.5, out_channels=2),
}
# What the repository PixArt-alpha/PixArt-XL-2-512x512 says of its transformer.
PUBLISHED = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.22.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "upcast_attention": False,
    "use_linear_projection": False,
}


def inputs_of(settings, edge, dtype=torch.float32):
    """(images, states of captions, which of them there are, their timesteps)."""
    channels = settings.get("in_channels", 4)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    images = numbers(1, 3, channels, edge, edge, dtype=dtype)
    return images, numbers(2, 3, 9, settings["caption_channels"], dtype=dtype), mask, torch.tensor(STEPS)


def theirs_of(theirs, image, states, mask, steps):
    return theirs(image, states, steps, encoder_attention_mask=mask, return_dict=False)[0]


def ours_of(ours, image, states, mask, steps):
    size = tuple(image.shape[2:])
    return ours(image, timesteps_B=times_of(steps.tolist()), size=size, text_states_BLC=states, text_mask_BL=mask)


@pytest.mark.parametrize("scale", [1, 2 / 3, 2], ids=["own_size", "smaller", "larger"])
@pytest.mark.parametrize("name", SIZES)
def test_output_is_that_of_diffusers(name, scale):
    theirs = their_network(diffusers.PixArtTransformer2DModel, SIZES[name])
    ours, patch = our_network(theirs, NAME), theirs.config.patch_size
    edge = min(64, round(scale * theirs.config.sample_size / patch) * patch)  # 64: for time's sake
    inputs = inputs_of(theirs.config, edge)
    expected = theirs_of(theirs, *inputs)
    assert expected.shape == (3, theirs.out_channels, edge, edge) and expected.std() > 0.3
    torch.testing.assert_close(ours_of(ours, *inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "other_ends", "interpolated"])
def test_output_and_gradients_in_float64(name):
    """Of the image, the states and every parameter."""
    theirs = their_network(diffusers.PixArtTransformer2DModel, SIZES[name], torch.float64)
    embed, edge = theirs.pos_embed, theirs.config.sample_size
    # Theirs rounds its positions to float32; here they are as its own function returns them.
    embed.pos_embed = diffusers.models.embeddings.get_2d_sincos_pos_embed(
        embed.proj.out_channels,
        edge // embed.patch_size,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        output_type="pt",
    )[None]
    ours = our_network(theirs, NAME)
    image, states, mask, steps = inputs_of(theirs.config, edge, torch.float64)
    mine, others = ([part.clone().requires_grad_() for part in (image, states)] for _ in range(2))
    output, expected = ours_of(ours, *mine, mask, steps), theirs_of(theirs, *others, mask, steps)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weight = numbers(3, *expected.shape, dtype=torch.float64)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for found, wanted in zip(mine, others, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)
    assert_same_gradients(theirs, ours, ARCHITECTURES[NAME].rules(*our_config(theirs.config, NAME)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_weights_go_there_and_back_bit_for_bit(name, dtype):
    theirs = their_network(diffusers.PixArtTransformer2DModel, SIZES[name], dtype)
    again = there_and_back(theirs, NAME)
    inputs = inputs_of(theirs.config, theirs.config.patch_size * 2, dtype)
    assert torch.equal(theirs_of(again.to(dtype).eval(), *inputs), theirs_of(theirs, *inputs))


def test_the_preset_is_the_published_network():
    """Whose config.json names the class that it was of."""
    model, text = our_config(PUBLISHED, "Transformer2DModel")
    assert model == ECDiTConfig(**PRESETS["pixart-xl-2"])
    assert text == TextConfig(kind="precomputed", channels=4096, width=1152, length=120)
    total = sum(parameter.numel() for parameter in whole_model(model, text).parameters())
    assert total == 610_856_096
    architecture = ARCHITECTURES["Transformer2DModel"]
    assert architecture.their_config(model, text)["_class_name"] == NAME
    assert [rule.theirs for rule in architecture.rules(model, text)] == [
        rule.theirs for rule in ARCHITECTURES[NAME].rules(model, text)
    ]


GOOD = size(4, 8, 3, 16, 20)
REFUSED = {
    "use_additional_conditions": True,
    "caption_channels": None,
    "attention_bias": False,
    "norm_elementwise_affine": True,
    "activation_fn": "geglu",
    "norm_type": "ada_norm",
    "cross_attention_dim": 768,
    "upcast_attention": True,
    "dropout": 0.1,
    "attention_type": "gated",
    "num_layers": 0,
    "sample_size": "128",
    "patch_size": True,
    "norm_eps": "tiny",
    "only_cross_attention": True,
    "rope": 3,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_does_not_map_is_refused_by_name(key):
    with pytest.raises(ValueError, match=rf"{NAME}.*: {key}={REFUSED[key]!r}") as refusal:
        ARCHITECTURES[NAME].sections(GOOD | {"use_additional_conditions": False, key: REFUSED[key]})
    assert ";" not in str(refusal.value)  # nothing else is wrong


def test_all_settings_that_do_not_map_are_named_at_once():
    with pytest.raises(ValueError) as refusal:
        ARCHITECTURES[NAME].sections(GOOD | REFUSED)
    assert all(f"{key}=" in str(refusal.value) for key in REFUSED)


def test_the_default_of_large_images_has_additional_conditions():
    with pytest.raises(ValueError, match="use_additional_conditions"):
        ARCHITECTURES[NAME].sections({**GOOD, "sample_size": 128})
    ARCHITECTURES[NAME].sections({**GOOD, "sample_size": 128, "use_additional_conditions": False})


OURS_REFUSED = {
    "kv_heads": 2,
    "qk_norm": True,
    "bias": False,
    "feedforward": "swiglu",
    "modulation": "gated",
    "embedders": "per_layer",
    "positions": "rotary",
    "conditioning": "class",
    "time_frequency_shift": 1,
    "feedforward_norm_eps": 1e-5,
    "experts": 4,
    "ffn_ratio": 3.0,
    "width": 64,
}


@pytest.mark.parametrize("key", OURS_REFUSED)
def test_ours_that_is_not_theirs_is_refused_by_name(key):
    model, text = our_config(GOOD, NAME, **{key: OURS_REFUSED[key]})
    with pytest.raises(ValueError, match=rf"{NAME}.*: .*model\.{key}={OURS_REFUSED[key]!r}"):
        ARCHITECTURES[NAME].their_config(model, text)


def test_all_of_ours_that_is_not_theirs_is_named_at_once():
    model, _ = our_config(GOOD, NAME, **OURS_REFUSED)
    with pytest.raises(ValueError) as refusal:
        ARCHITECTURES[NAME].their_config(model, TextConfig(width=24, pooled=768))
    assert all(f"model.{key}=" in str(refusal.value) for key in OURS_REFUSED)
    assert "text.kind='builtin'" in str(refusal.value) and "text.width=24" in str(refusal.value)
    assert "text.pooled=768" in str(refusal.value)
