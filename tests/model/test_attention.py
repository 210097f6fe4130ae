"""Grouped-query attention against a softmax written out."""

import math
from dataclasses import replace

import pytest
import torch

from megadit.model.attention import CrossAttention, HeadNorm, SelfAttention


def turned(y, angles):
    """Pairs of features of [B, T, H, K] as complex numbers, times units of the angles [T, K / 2]."""
    unit = torch.complex(angles.cos(), angles.sin())[:, None]
    return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * unit).flatten(-2)


def naive_attention(layer, config, x, context, mask, angles=None):
    def heads(linear, source, norm):
        y = source @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        y = y.unflatten(-1, (-1, config.head_width))
        if isinstance(norm, HeadNorm):
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        return y

    query = heads(layer.q, x, layer.q_norm)
    # Head h reads key-value head h // (heads / kv_heads).
    group = config.heads // config.kv_heads
    key = torch.stack([heads(layer.k, context, layer.k_norm)[:, :, h // group] for h in range(config.heads)], 2)
    value = torch.stack([heads(layer.v, context, None)[:, :, h // group] for h in range(config.heads)], 2)
    if angles is not None:
        query, key = turned(query, angles), turned(key, angles)
    scores = torch.einsum("bthk,bshk->bhts", query, key) / math.sqrt(config.head_width)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    y = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), value).flatten(2) @ layer.out.weight.T
    return y if layer.out.bias is None else y + layer.out.bias


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_self_attention_equals_a_softmax_written_out(config, region, filled, randn, kv_heads, bias, qk_norm):
    changed = replace(config, kv_heads=kv_heads, bias=bias, qk_norm=qk_norm)
    layer, x = filled(SelfAttention(changed, region)), randn(2, 9, 32)
    torch.testing.assert_close(layer(x), naive_attention(layer, changed, x, x, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_queries_and_keys_are_turned_after_their_norm_and_values_are_not(config, region, filled, randn, qk_norm):
    changed = replace(config, qk_norm=qk_norm)
    layer, x, angles = filled(SelfAttention(changed, region)), randn(2, 9, 32), randn(9, 3)
    pairs = angles.repeat_interleave(2, dim=1)
    found = layer(x, torch.stack([pairs.cos(), pairs.sin()])[:, None, None])
    torch.testing.assert_close(found, naive_attention(layer, changed, x, x, None, angles), rtol=0, atol=1e-12)
    assert not torch.allclose(found, layer(x))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cross_attention_equals_a_masked_softmax_written_out(config, region, filled, randn, kv_heads, qk_norm):
    changed = replace(config, kv_heads=kv_heads, qk_norm=qk_norm)
    layer, x, text = filled(CrossAttention(changed, 16, region)), randn(2, 9, 32), randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    expected = naive_attention(layer, changed, x, text, mask)
    torch.testing.assert_close(layer(x, text, mask), expected, rtol=0, atol=1e-12)


def test_padded_caption_tokens_change_nothing(config, region, filled, randn):
    layer, x, text = filled(CrossAttention(config, 16, region)), randn(2, 9, 32), randn(2, 5, 16)
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    other = torch.where(mask[:, :, None], text, 100 * randn(2, 5, 16))
    torch.testing.assert_close(layer(x, other, mask), layer(x, text, mask), rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x, other, torch.ones_like(mask)), layer(x, text, torch.ones_like(mask)))


def test_head_norm_is_torch_rms_norm(filled, randn):
    ours, x = filled(HeadNorm(6)), randn(2, 4, 9, 6)
    theirs = torch.nn.RMSNorm(6, eps=1e-6, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-14)
