"""Patches, positions and times against loops and against diffusers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megadit.model.embed import Embedding, Head, patchify, time_features, unpatchify
from megadit.model.positions import sincos_positions
from megadit.model.text import TextConfig

CPU = torch.device("cpu")
SIZES = [(8, 8), (4, 12), (12, 4), (2, 2)]


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_cut_row_by_row(randn, size):
    (height, width), image = size, randn(2, 3, *size)
    tokens = patchify(image, 2)
    assert tokens.shape == (2, height * width // 4, 12)
    for b in range(2):
        for row in range(height // 2):
            for column in range(width // 2):
                cut = image[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert torch.equal(tokens[b, row * (width // 2) + column], cut.flatten())


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_unpatchify_is_the_inverse(randn, size, patch):
    image = randn(2, 3, *size)
    assert torch.equal(unpatchify(patchify(image, patch), patch, size), image)


@pytest.mark.parametrize("shift", [0, 1])
def test_time_features_agree_with_diffusers(shift):
    reference = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is the reference")
    times = torch.linspace(0, 1, 33)
    theirs = reference.get_timestep_embedding(1000 * times, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(time_features(times, shift), theirs, rtol=0, atol=1e-6)


def test_time_features_are_cosines_then_sines():
    times = [0.0, 0.25, 1.0]
    expected = [
        [f(1000 * t / 10000 ** (i / 128)) for f in (math.cos, math.sin) for i in range(128)] for t in times
    ]  # fmt: skip
    features = time_features(torch.tensor(times, dtype=torch.float64))
    # The frequencies are rounded to float32, the angles reach 1000.
    torch.testing.assert_close(features, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1000 * 2**-23)


@pytest.mark.parametrize(("size", "scale"), [((8, 8), 1.0), ((16, 8), 0.5), ((4, 4), 2.0)])
def test_embedding_is_patches_and_positions_and_a_time_network(config, text, region, filled, randn, size, scale):
    """An image of another size spans the coordinates of `image_size`."""
    embedding, image, times = (
        filled(Embedding(config, text, region)),
        randn(2, 3, *size),
        torch.tensor([0.2, 0.7]).double(),
    )
    ids, mask = torch.tensor([[2, 7, 3], [2, 3, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    x, cond, states = embedding(image, times, ids, mask, None)
    positions = sincos_positions(size[0] // 2, size[1] // 2, 32, scale, CPU)
    expected = patchify(image, 2) @ embedding.patch.weight.T + embedding.patch.bias + positions
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)
    hidden = F.silu(time_features(times) @ embedding.time_in.weight.T + embedding.time_in.bias)
    expected = hidden @ embedding.time_out.weight.T + embedding.time_out.bias
    torch.testing.assert_close(cond, expected, rtol=0, atol=1e-13)
    assert torch.equal(states, embedding.text(ids, mask))


def test_positions_may_be_interpolated_and_frequencies_shifted(config, text, region, filled, randn):
    config = replace(config, position_interpolation=2.0, time_frequency_shift=1)
    embedding, image, times = filled(Embedding(config, text, region)), randn(2, 3, 16, 8), torch.tensor([0.2, 0.7])
    ids = torch.tensor([[2, 7, 3]] * 2)
    x, cond, _ = embedding(image, times.double(), ids, ids > 0, None)
    patches = patchify(image, 2) @ embedding.patch.weight.T + embedding.patch.bias
    torch.testing.assert_close(x, patches + sincos_positions(8, 4, 32, 0.25, CPU), rtol=0, atol=1e-13)
    hidden = F.silu(time_features(times.double(), 1) @ embedding.time_in.weight.T + embedding.time_in.bias)
    torch.testing.assert_close(cond, hidden @ embedding.time_out.weight.T + embedding.time_out.bias, rtol=0, atol=1e-13)


def test_a_shared_modulation_is_made_here_for_all_layers(config, text, region, filled, randn):
    """A linear layer of SiLU, as every layer has one where they are not shared; whole again where it is cut."""
    embedding = filled(Embedding(replace(config, modulation="shared"), text, region))
    ids = torch.tensor([[2, 7, 3]] * 2)
    _, cond, shared, states = embedding(randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]).double(), ids, ids > 0, None)
    linear = embedding.modulation.linear
    expected = (F.silu(cond) @ linear.weight.T + linear.bias).view(2, 6, 32)
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-13)
    assert torch.equal(states, embedding.text(ids, ids > 0))


def test_states_of_a_frozen_encoder_pass_two_layers(config, region, filled, randn):
    text = TextConfig(kind="precomputed", channels=10, width=16)
    embedding, states = filled(Embedding(config, text, region)), randn(2, 5, 10)
    names = {name for name, _ in embedding.named_parameters() if name.startswith("text")}
    assert names == {f"text.{layer}.{part}" for layer in ("project_in", "project_out") for part in ("weight", "bias")}
    found = embedding(randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]).double(), None, None, None, states)[-1]
    first, second = embedding.text.project_in, embedding.text.project_out
    hidden = F.gelu(states @ first.weight.T + first.bias, approximate="tanh")
    torch.testing.assert_close(found, hidden @ second.weight.T + second.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("modulation", ["gated", "shared"])
def test_a_pooled_caption_is_added_to_the_time(config, region, filled, randn, modulation):
    """Two layers with a SiLU between, before a shared modulation reads the sum; in the precision of the network."""
    text, config = (
        TextConfig(kind="t5+clip", channels=10, width=16, pooled=7),
        replace(config, modulation=modulation),
    )
    embedding, states, pooled = filled(Embedding(config, text, region)), randn(2, 5, 10), randn(2, 7)
    image, times = randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]).double()
    _, cond, *rest = embedding(image, times, None, None, None, states, pooled)
    hidden = F.silu(time_features(times) @ embedding.time_in.weight.T + embedding.time_in.bias)
    expected = hidden @ embedding.time_out.weight.T + embedding.time_out.bias
    hidden = F.silu(pooled @ embedding.pooled_in.weight.T + embedding.pooled_in.bias)
    expected = expected + hidden @ embedding.pooled_out.weight.T + embedding.pooled_out.bias
    torch.testing.assert_close(cond, expected, rtol=0, atol=1e-12)
    if modulation == "shared":
        linear = embedding.modulation.linear
        wanted = (F.silu(expected) @ linear.weight.T + linear.bias).view(2, 6, 32)
        torch.testing.assert_close(rest[0], wanted, rtol=0, atol=1e-12)
    rounded = embedding(image, times, None, None, None, states.float(), pooled.float())
    torch.testing.assert_close(rounded[1], cond, rtol=0, atol=1e-5)
    assert rounded[1].dtype == rounded[-1].dtype == torch.float64


def test_a_class_is_added_to_the_time(config, text, region, filled, randn):
    """As DiT does, with one class more, which stands for none."""
    config = replace(config, conditioning="class", classes=5)
    embedding, image = filled(Embedding(config, text, region)), randn(3, 3, 8, 8)
    times, labels = torch.tensor([0.2, 0.7, 0.7]).double(), torch.tensor([4, 0, 5])
    assert embedding.labels.shape == (6, 32)
    assert not any(name.startswith("text") for name, _ in embedding.named_parameters())
    x, cond = embedding(image, times, None, None, labels)
    hidden = F.silu(time_features(times) @ embedding.time_in.weight.T + embedding.time_in.bias)
    expected = hidden @ embedding.time_out.weight.T + embedding.time_out.bias + embedding.labels[labels]
    torch.testing.assert_close(cond, expected, rtol=0, atol=1e-13)
    captioned = filled(Embedding(replace(config, conditioning="text"), text, region))
    assert captioned.labels is None
    ids = torch.tensor([[2, 3]] * 3)
    assert torch.equal(captioned(image, times, ids, ids > 0, None)[0], x)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_dropped_tokens_are_dropped_with_their_positions(config, text, region, filled, randn, positions):
    embedding, image = filled(Embedding(replace(config, positions=positions), text, region)), randn(2, 3, 8, 12)
    places, ids = torch.tensor([[0, 5, 23], [2, 3, 19]]), torch.tensor([[2, 7, 3]] * 2)
    told = (torch.tensor([0.2, 0.7]).double(), ids, ids > 0, None)
    whole, part = embedding(image, *told), embedding(image, *told, kept_BT=places)
    expected = torch.stack([whole[0][0, places[0]], whole[0][1, places[1]]])
    torch.testing.assert_close(part[0], expected, rtol=0, atol=1e-12)
    assert torch.equal(part[1], whole[1]) and torch.equal(part[2], whole[2])


def test_head_modulates_and_puts_patches_in_their_places(config, region, filled, randn):
    head, x, cond = filled(Head(config, region)), randn(2, 8, 32), randn(2, 32)
    shift, scale = head.modulation(cond)
    patches = (F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift) @ head.linear.weight.T + head.linear.bias
    image = head(x, cond, (8, 4))
    assert image.shape == (2, 3, 8, 4)
    torch.testing.assert_close(patchify(image, 2), patches, rtol=0, atol=1e-13)


def test_head_of_a_shared_modulation_adds_its_table_to_the_conditioning(config, region, filled, randn):
    config = replace(config, modulation="shared", out_channels=5)
    head, x, cond = filled(Head(config, region)), randn(2, 8, 32), randn(2, 32)
    assert {name for name, _ in head.named_parameters()} == {"modulation.table", "linear.weight", "linear.bias"}
    shift, scale = (cond + row for row in head.modulation.table)
    normed = F.layer_norm(x, (32,), eps=1e-6)
    patches = (normed * (1 + scale[:, None]) + shift[:, None]) @ head.linear.weight.T + head.linear.bias
    image = head(x, cond, (8, 4))
    assert image.shape == (2, 5, 8, 4)
    torch.testing.assert_close(patchify(image, 2), patches, rtol=0, atol=1e-13)
