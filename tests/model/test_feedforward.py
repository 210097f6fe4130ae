"""The feed-forward layer against its formula and against the one of diffusers."""

import math
from dataclasses import replace

import pytest
import torch

from megadit.model.feedforward import FeedForward


@pytest.mark.parametrize("bias", [True, False])
def test_feedforward_is_two_matrices_and_a_tanh_gelu(config, region, filled, randn, bias):
    layer, x = filled(FeedForward(config, region, 96, bias)), randn(2, 5, 32)
    assert layer.up.weight.shape == (96, 32) and layer.down.weight.shape == (32, 96)
    hidden = x @ layer.up.weight.T + (layer.up.bias if bias else 0)
    hidden = hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))) / 2
    expected = hidden @ layer.down.weight.T + (layer.down.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_feedforward_agrees_with_diffusers(config, region, filled, randn, bias):
    attention = pytest.importorskip("diffusers.models.attention", reason="diffusers is the reference")
    ours, x = filled(FeedForward(config, region, 128, bias)), randn(2, 5, 32)
    theirs = attention.FeedForward(32, mult=4, activation_fn="gelu-approximate", bias=bias).to(torch.float64)
    names = {"up.weight": "net.0.proj.weight", "down.weight": "net.2.weight"}
    names |= {"up.bias": "net.0.proj.bias", "down.bias": "net.2.bias"} if bias else {}
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_agrees_with_diffusers(config, region, filled, randn, bias):
    attention = pytest.importorskip("diffusers.models.attention", reason="diffusers is the reference")
    config = replace(config, feedforward="swiglu")
    ours, x = filled(FeedForward(config, region, 80, bias)), randn(2, 5, 32)
    theirs = attention.FeedForward(32, inner_dim=80, activation_fn="swiglu", bias=bias).to(torch.float64)
    state = ours.state_dict()
    for kind in ["weight", "bias"][: 1 + bias]:
        # Theirs is one matrix, of which the second half passes the SiLU.
        state[f"net.0.proj.{kind}"] = torch.cat([state.pop(f"up.{kind}"), state.pop(f"gate.{kind}")])
        state[f"net.2.{kind}"] = state.pop(f"down.{kind}")
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("feedforward", ["gelu", "swiglu"])
def test_a_share_is_the_whole_output_where_there_is_one_rank(config, region, filled, randn, feedforward):
    layer, x = filled(FeedForward(replace(config, feedforward=feedforward), region, 64, False)), randn(2, 5, 32)
    torch.testing.assert_close(layer.share(x), layer(x), rtol=0, atol=1e-12)


def test_one_wide_layer_is_the_sum_of_experts_side_by_side(config, region, filled, randn):
    """So shared experts are one feed-forward layer."""
    config = replace(config, feedforward="swiglu")
    wide, x = filled(FeedForward(config, region, 96, False)), randn(2, 5, 32)
    outputs = []
    for rows in torch.arange(96).chunk(3):
        hidden = torch.nn.functional.silu(x @ wide.gate.weight[rows].T) * (x @ wide.up.weight[rows].T)
        outputs.append(hidden @ wide.down.weight[:, rows].T)
    torch.testing.assert_close(wide(x), sum(outputs), rtol=0, atol=1e-12)
