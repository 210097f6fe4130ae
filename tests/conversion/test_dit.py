"""DiT as diffusers has it: the same outputs and gradients with its weights, and its weights back, bit for bit."""

import pytest
import torch

from megadit.conversion.diffusers import ARCHITECTURES
from megadit.model.config import PRESETS, ECDiTConfig
from megadit.model.ecdit import whole_model
from megadit.model.text import TextConfig
from tests.conversion.networks import (
    assert_same_gradients,
    bits,
    converted,
    numbers,
    our_config,
    our_network,
    same_bits,
    their_network,
    there_and_back,
    times_of,
)

diffusers = pytest.importorskip("diffusers")
NAME = "DiTTransformer2DModel"
STEPS = [999, 250, 1]


def size(heads, width, layers, sample_size, classes, **others):
    settings = {"num_attention_heads": heads, "attention_head_dim": width, "num_layers": layers}
    return settings | {"sample_size": sample_size, "num_embeds_ada_norm": classes, **others}


SIZES = {
    "small": size(4, 8, 3, 16, 10),
    "other_ends": size(2, 24, 2, 12, 1, in_channels=3, out_channels=6, patch_size=3, norm_eps=1e-3),
    "head_width_72": size(2, 72, 2, 32, 1000, norm_num_groups=8),
    "one_layer": size(3, 12, 1, 6, 5, patch_size=1, norm_eps=1e-6),
}
# What the repository facebook/DiT-XL-2-256 says of its transformer.
PUBLISHED = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}


def inputs_of(settings, edge, dtype=torch.float32):
    """(images, their timesteps, classes); the last one is no class."""
    classes = settings["num_embeds_ada_norm"]
    images = numbers(1, 3, settings.get("in_channels", 4), edge, edge, dtype=dtype)
    return images, torch.tensor(STEPS), torch.tensor([0, classes - 1, classes])


def theirs_of(theirs, image, steps, labels):
    return theirs(image, steps, labels, return_dict=False)[0]


def ours_of(ours, image, steps, labels):
    return ours(image, timesteps_B=times_of(steps.tolist()), size=tuple(image.shape[2:]), labels_B=labels)


@pytest.mark.parametrize("scale", [1, 2 / 3, 2], ids=["own_size", "smaller", "larger"])
@pytest.mark.parametrize("name", SIZES)
def test_output_is_that_of_diffusers(name, scale):
    theirs = their_network(diffusers.DiTTransformer2DModel, SIZES[name])
    ours, patch = our_network(theirs, NAME), theirs.config.patch_size
    edge = round(scale * theirs.config.sample_size / patch) * patch
    inputs = inputs_of(theirs.config, edge)
    expected = theirs_of(theirs, *inputs)
    assert expected.shape == (3, theirs.out_channels, edge, edge) and expected.std() > 0.3
    torch.testing.assert_close(ours_of(ours, *inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_output_and_gradients_in_float64(name):
    """Of the image and every parameter."""
    theirs = their_network(diffusers.DiTTransformer2DModel, SIZES[name], torch.float64)
    embed, edge = theirs.pos_embed, theirs.config.sample_size
    # Theirs rounds its positions to float32; here they are as its own function returns them.
    embed.pos_embed = diffusers.models.embeddings.get_2d_sincos_pos_embed(
        embed.proj.out_channels, edge // embed.patch_size, base_size=embed.base_size, output_type="pt"
    )[None]
    ours = our_network(theirs, NAME)
    image, steps, labels = inputs_of(theirs.config, edge, torch.float64)
    mine, other = (image.clone().requires_grad_() for _ in range(2))
    output, expected = ours_of(ours, mine, steps, labels), theirs_of(theirs, other, steps, labels)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weight = numbers(3, *expected.shape, dtype=torch.float64)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert_same_gradients(theirs, ours, ARCHITECTURES[NAME].rules(*our_config(theirs.config, NAME)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_weights_go_there_and_back_bit_for_bit(name, dtype):
    theirs = their_network(diffusers.DiTTransformer2DModel, SIZES[name], dtype)
    again = there_and_back(theirs, NAME)
    inputs = inputs_of(theirs.config, theirs.config.patch_size * 2, dtype)
    assert torch.equal(theirs_of(again.to(dtype).eval(), *inputs), theirs_of(theirs, *inputs))


def with_equal_embedders(theirs):
    """As the published weights are."""
    first = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return theirs


def test_equal_embedders_may_be_shared():
    """Ours with shared ones computes the same, and is written as the same weights."""
    theirs = with_equal_embedders(their_network(diffusers.DiTTransformer2DModel, SIZES["small"]))
    ours = our_network(theirs, NAME, embedders="shared")
    names = {name for name, _ in ours.named_parameters()}
    assert not any("embedder" in name for name in names) and "embed.labels" in names
    inputs = inputs_of(theirs.config, 16)
    torch.testing.assert_close(ours_of(ours, *inputs), theirs_of(theirs, *inputs), rtol=0, atol=1e-5)
    back = converted(ARCHITECTURES[NAME].rules(ours.config, TextConfig()), ours.state_dict(), to_ours=False)
    assert same_bits(back, theirs.state_dict())
    storages = {value.untyped_storage().data_ptr() for value in back.values()}
    assert len(storages) == len(back)  # safetensors refuses tensors that share memory
    config = ARCHITECTURES[NAME].their_config(ours.config, TextConfig())
    assert config == ARCHITECTURES[NAME].their_config(*our_config(theirs.config, NAME))


@pytest.mark.parametrize("part", ["timestep_embedder.linear_1.bias", "class_embedder.embedding_table.weight"])
def test_other_embedders_cannot_be_shared(part):
    theirs = with_equal_embedders(their_network(diffusers.DiTTransformer2DModel, SIZES["small"]))
    odd = f"transformer_blocks.2.norm1.emb.{part}"
    with torch.no_grad():
        bits(theirs.state_dict()[odd])[..., 0] ^= 1  # the last bit of some elements
    with pytest.raises(ValueError, match=rf"{odd} differs from transformer_blocks\.0.*embedders=per_layer"):
        our_network(theirs, NAME, embedders="shared")


def test_the_preset_is_the_published_network():
    """Whose config.json names the class that it was of."""
    model, text = our_config(PUBLISHED, "Transformer2DModel")
    assert model == ECDiTConfig(**PRESETS["dit-xl-2"])
    assert text == TextConfig()
    total = sum(parameter.numel() for parameter in whole_model(model, text).parameters())
    # 675 million with one embedder (DiT's paper), and 27 more of each.
    embedder = 256 * 1152 + 1152 + 1152 * 1152 + 1152 + 1001 * 1152
    assert round((total - 27 * embedder) / 1e6) == 675
    assert ARCHITECTURES["Transformer2DModel"].their_config(model, text)["_class_name"] == NAME


GOOD = size(4, 8, 3, 16, 10)
REFUSED = {
    "norm_type": "ada_norm",
    "num_embeds_ada_norm": None,
    "attention_bias": False,
    "norm_elementwise_affine": True,
    "activation_fn": "gelu",
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "num_attention_heads": 1.5,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_does_not_map_is_refused_by_name(key):
    with pytest.raises(ValueError, match=rf"{NAME}.*: {key}={REFUSED[key]!r}") as refusal:
        ARCHITECTURES[NAME].sections(GOOD | {key: REFUSED[key]})
    assert ";" not in str(refusal.value)  # nothing else is wrong


def test_all_settings_that_do_not_map_are_named_at_once():
    with pytest.raises(ValueError) as refusal:
        ARCHITECTURES[NAME].sections(GOOD | REFUSED)
    assert all(f"{key}=" in str(refusal.value) for key in REFUSED)


def test_a_class_of_neither_norm_is_refused():
    with pytest.raises(ValueError, match="norm_type='layer_norm'.*ada_norm_single.*ada_norm_zero"):
        ARCHITECTURES["Transformer2DModel"].sections(GOOD | {"norm_type": "layer_norm"})


OURS_REFUSED = {
    "conditioning": "text",
    "modulation": "shared",
    "time_frequency_shift": 0,
    "position_interpolation": 2.0,
    "attention_norm_eps": 1e-5,
    "qk_norm": True,
    "experts": 4,
}


@pytest.mark.parametrize("key", OURS_REFUSED)
def test_ours_that_is_not_theirs_is_refused_by_name(key):
    model, text = our_config(GOOD, NAME, **{key: OURS_REFUSED[key]})
    with pytest.raises(ValueError, match=rf"{NAME}.*: model\.{key}={OURS_REFUSED[key]!r}") as refusal:
        ARCHITECTURES[NAME].their_config(model, text)
    assert ";" not in str(refusal.value)
