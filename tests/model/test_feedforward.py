"""The feed-forward layer against its formula and against the one of diffusers."""

import math
from dataclasses import replace

import pytest
import torch

from megadit.model.feedforward import FeedForward


@pytest.mark.parametrize("bias", [True, False])
def test_feedforward_is_two_matrices_and_a_tanh_gelu(config, region, filled, randn, bias):
    layer, x = filled(FeedForward(replace(config, bias=bias, ffn_ratio=3), region)), randn(2, 5, 32)
    assert layer.up.weight.shape == (96, 32) and layer.down.weight.shape == (32, 96)
    hidden = x @ layer.up.weight.T + (layer.up.bias if bias else 0)
    hidden = hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))) / 2
    expected = hidden @ layer.down.weight.T + (layer.down.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_feedforward_agrees_with_diffusers(config, region, filled, randn, bias):
    attention = pytest.importorskip("diffusers.models.attention", reason="diffusers is the reference")
    ours, x = filled(FeedForward(replace(config, bias=bias), region)), randn(2, 5, 32)
    theirs = attention.FeedForward(32, mult=4, activation_fn="gelu-approximate", bias=bias).to(torch.float64)
    names = {"up.weight": "net.0.proj.weight", "down.weight": "net.2.weight"}
    names |= {"up.bias": "net.0.proj.bias", "down.bias": "net.2.bias"} if bias else {}
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)
