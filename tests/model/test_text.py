"""The text encoder against torch's own transformer layer."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megadit.model.text import TextEncoder, TextLayer, readable

MASK = torch.tensor([[True] * 6, [True, True, True, False, False, False]])


def torch_layer(ours, config):
    """torch's layer with the weights of ours."""
    theirs = torch.nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        4 * config.width,
        dropout=0.0,
        activation=partial(F.gelu, approximate="tanh"),
        batch_first=True,
        norm_first=True,
        bias=False,
        dtype=torch.float64,
    )
    names = {
        "attention_norm.weight": "norm1.weight",
        "qkv.weight": "self_attn.in_proj_weight",
        "out.weight": "self_attn.out_proj.weight",
        "feedforward_norm.weight": "norm2.weight",
        "up.weight": "linear1.weight",
        "down.weight": "linear2.weight",
    }
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    return theirs


def test_layer_agrees_with_torch(filled, text, randn):
    ours, x = filled(TextLayer(text)), randn(2, 6, 16)
    theirs = torch_layer(ours, text)
    output, expected = ours(x, MASK[:, None, None, :]), theirs(x, src_key_padding_mask=~MASK)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_encoder_is_embeddings_layers_and_a_norm(filled, text):
    encoder = filled(TextEncoder(text))
    ids = torch.tensor([[2, 5, 19, 7, 3, 0], [2, 9, 3, 0, 0, 0]])
    x = encoder.tokens[ids] + encoder.positions
    for layer in encoder.layers:
        x = torch_layer(layer, text)(x, src_key_padding_mask=~MASK)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * encoder.norm.weight
    torch.testing.assert_close(encoder(ids, MASK), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [4, 6])
def test_padding_does_not_change_the_tokens(filled, text, length):
    encoder = filled(TextEncoder(text))
    ids = torch.tensor([[2, 9, 3, 0, 0, 0]])[:, :length]
    mask = torch.arange(length)[None] < 3
    other = torch.where(mask, ids, 11)
    expected = encoder(ids, mask)[:, :3]
    torch.testing.assert_close(encoder(other, mask)[:, :3], expected, rtol=0, atol=1e-12)
    # Nor does its length.
    torch.testing.assert_close(encoder(ids[:, :3], mask[:, :3]), expected, rtol=0, atol=1e-13)


def test_a_caption_without_a_token_is_read_whole():
    """All others are read as their mask says."""
    assert torch.equal(readable(MASK), MASK)
    empty = torch.tensor([[False] * 3, [True, False, False]])
    assert readable(empty).tolist() == [[True] * 3, [True, False, False]]


def test_a_caption_without_a_token_has_finite_states_and_gradients(filled, text):
    encoder, ids = filled(TextEncoder(text)), torch.tensor([[0] * 6, [2, 9, 3, 0, 0, 0]])
    states = encoder(ids, torch.stack([torch.zeros(6, dtype=torch.bool), MASK[1]]))
    states.square().sum().backward()
    assert states.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    torch.testing.assert_close(states[1], encoder(ids[1:], MASK[1:])[0], rtol=0, atol=1e-13)
