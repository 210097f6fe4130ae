"""One layer against the adaLN formula written out."""

from dataclasses import replace

import pytest
import torch

from megadit.model.block import Block
from megadit.model.embed import Modulation, modulate
from megadit.model.feedforward import FeedForward
from megadit.model.moe import ExpertChoiceMoE

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


@pytest.fixture
def build(config, region, grid, filled):
    def block(layer, **changes):
        return filled(Block(replace(config, **changes), 16, layer, region, grid["ep"]))

    return block


@pytest.fixture
def inputs(randn):
    """(x, conditioning, caption, mask)."""
    return randn(2, 12, 32), randn(2, 32), randn(2, 4, 16), MASK


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def adaln(block, cond, place):
    """The `place`-th modulation vector, [B, 1, D]: rows of the linear layer after SiLU."""
    linear = block.modulation.linear
    rows = slice(32 * place, 32 * (place + 1))
    return ((cond * cond.sigmoid()) @ linear.weight[rows].T + linear.bias[rows])[:, None, :]


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_ungated_block_is_the_formula(build, inputs, layer):
    block, (x, cond, text, mask) = build(layer), inputs
    shift_1, scale_1, shift_2, scale_2 = (adaln(block, cond, place) for place in range(4))
    y = x + block.attention(norm(x) * (1 + scale_1) + shift_1)
    y = y + block.cross_attention(y, text, mask)
    y = y + block.feedforward(norm(y) * (1 + scale_2) + shift_2)
    torch.testing.assert_close(block(*inputs), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_gated_block_is_the_formula(build, inputs, layer):
    block, (x, cond, text, mask) = build(layer, modulation="gated"), inputs
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (adaln(block, cond, place) for place in range(6))
    y = x + gate_1 * block.attention(norm(x) * (1 + scale_1) + shift_1)
    y = y + block.cross_attention(y, text, mask)
    y = y + gate_2 * block.feedforward(norm(y) * (1 + scale_2) + shift_2)
    torch.testing.assert_close(block(*inputs), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_zero_modulation_with_gates_leaves_cross_attention_alone(build, inputs, layer):
    block, (x, _, text, mask) = build(layer, modulation="gated"), inputs
    torch.nn.init.zeros_(block.modulation.linear.weight)
    torch.nn.init.zeros_(block.modulation.linear.bias)
    assert torch.equal(block(*inputs), x + block.cross_attention(x, text, mask))


def test_layers_1_3_5_have_experts(build):
    kinds = [type(build(layer).feedforward) for layer in range(4)]
    assert kinds == [FeedForward, ExpertChoiceMoE] * 2
    assert type(build(1, experts=0).feedforward) is FeedForward


def test_modulation_chunks_a_linear_layer_of_silu(filled, region, randn):
    modulation, cond = filled(Modulation(8, 3, region)), randn(2, 8)
    whole = torch.nn.functional.silu(cond) @ modulation.linear.weight.T + modulation.linear.bias
    vectors = modulation(cond)
    assert [vector.shape for vector in vectors] == [(2, 1, 8)] * 3
    torch.testing.assert_close(torch.cat(vectors, dim=2)[:, 0], whole, rtol=0, atol=1e-14)


def test_modulate_is_a_layer_norm_scaled_and_shifted(randn):
    x, shift, scale = randn(2, 5, 8), randn(2, 1, 8), randn(2, 1, 8)
    torch.testing.assert_close(modulate(x, shift, scale), norm(x) * (1 + scale) + shift, rtol=0, atol=1e-14)
