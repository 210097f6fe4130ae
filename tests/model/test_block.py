"""One layer against the adaLN formula written out."""

from dataclasses import replace

import pytest
import torch

from megadit.model.block import Block
from megadit.model.embed import Modulation, modulate, normed
from megadit.model.feedforward import FeedForward
from megadit.model.moe import MoE

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


@pytest.fixture
def build(config, region, grid, filled):
    def block(layer, recompute_moe=False, **changes):
        return filled(Block(replace(config, **changes), 16, layer, region, grid["ep"], recompute_moe))

    return block


@pytest.fixture
def inputs(randn):
    """(x, conditioning, caption, mask)."""
    return randn(2, 12, 32), randn(2, 32), randn(2, 4, 16), MASK


def norm(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def adaln(block, cond, place):
    """The `place`-th modulation vector, [B, 1, D]: rows of the linear layer after SiLU."""
    linear = block.modulation.linear
    rows = slice(32 * place, 32 * (place + 1))
    return ((cond * cond.sigmoid()) @ linear.weight[rows].T + linear.bias[rows])[:, None, :]


def feed(block, plain, modulated, cond):
    """The second half's feed-forward layer, which a mixture of experts calls with more than its modulated tokens."""
    if isinstance(block.feedforward, MoE):
        return block.feedforward(modulated, plain, cond)[0]
    return block.feedforward(modulated)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("modulation", ["scale_shift", "gated"])
@pytest.mark.parametrize("router_input", ["modulated", "timestep"])
def test_block_is_the_formula(build, inputs, layer, modulation, router_input):
    block, (x, cond, text, mask) = build(layer, modulation=modulation, router_input=router_input), inputs
    if modulation == "gated":
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (adaln(block, cond, place) for place in range(6))
    else:
        shift_1, scale_1, shift_2, scale_2 = (adaln(block, cond, place) for place in range(4))
        gate_1 = gate_2 = 1
    y = x + gate_1 * block.attention(norm(x) * (1 + scale_1) + shift_1)
    y = y + block.cross_attention(y, text, mask)
    y = y + gate_2 * feed(block, norm(y), norm(y) * (1 + scale_2) + shift_2, cond)
    torch.testing.assert_close(block(*inputs)[0], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_a_shared_modulation_is_offset_by_the_layers_table(build, inputs, randn, layer):
    """adaLN-single (PixArt, arXiv 2310.00426): no linear layer here, and the conditioning is read by routers alone."""
    block, (x, cond, text, mask) = build(layer, modulation="shared"), inputs
    assert [name for name, _ in block.named_parameters() if "modulation" in name] == ["modulation.table"]
    shared = randn(2, 6, 32)
    vectors = [shared[:, i, None] + block.modulation.table[i] for i in range(6)]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors
    y = x + gate_1 * block.attention(norm(x) * (1 + scale_1) + shift_1)
    y = y + block.cross_attention(y, text, mask)
    y = y + gate_2 * feed(block, norm(y), norm(y) * (1 + scale_2) + shift_2, cond)
    torch.testing.assert_close(block(*inputs, shared)[0], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_each_norm_has_its_epsilon(build, inputs, layer):
    block = build(layer, attention_norm_eps=0.5, feedforward_norm_eps=0.25, router_input="timestep")
    x, cond, text, mask = inputs
    shift_1, scale_1, shift_2, scale_2 = (adaln(block, cond, place) for place in range(4))
    y = x + block.attention(norm(x, 0.5) * (1 + scale_1) + shift_1)
    y = y + block.cross_attention(y, text, mask)
    y = y + feed(block, norm(y, 0.25), norm(y, 0.25) * (1 + scale_2) + shift_2, cond)
    torch.testing.assert_close(block(*inputs)[0], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_zero_modulation_with_gates_leaves_cross_attention_alone(build, inputs, layer):
    block, (x, _, text, mask) = build(layer, modulation="gated"), inputs
    torch.nn.init.zeros_(block.modulation.linear.weight)
    torch.nn.init.zeros_(block.modulation.linear.bias)
    expected = x + block.cross_attention(x, text, mask)
    torch.testing.assert_close(block(*inputs)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_conditioning_on_classes_has_no_cross_attention(build, inputs, layer):
    block, (x, cond, _, _) = build(layer, conditioning="class", classes=3), inputs
    assert not any(name.startswith("cross_attention") for name, _ in block.named_parameters())
    shift_1, scale_1, shift_2, scale_2 = (adaln(block, cond, place) for place in range(4))
    y = x + block.attention(norm(x) * (1 + scale_1) + shift_1)
    y = y + feed(block, norm(y), norm(y) * (1 + scale_2) + shift_2, cond)
    torch.testing.assert_close(block(x, cond, None, None)[0], y, rtol=0, atol=1e-12)


def test_layers_1_3_5_have_experts(build):
    kinds = [type(build(layer).feedforward) for layer in range(4)]
    assert kinds == [FeedForward, MoE] * 2
    assert type(build(1, experts=0).feedforward) is FeedForward


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_what_the_router_did_comes_with_the_tokens(build, inputs, routing):
    assert build(0, routing=routing, balance_loss=0.1)(*inputs)[1] is None
    stats, balance, takers_GS = build(1, routing=routing, balance_loss=0.1)(*inputs)[1]
    assert stats.load_E.shape == (4,) and takers_GS.shape == inputs[0].shape[:2]
    assert (balance is None) == (routing == "expert_choice")


def saved_elements(run):
    """How many elements the forward of `run` keeps for its backward, and what it returns."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 8, out


@pytest.mark.parametrize(
    "changes",
    [{}, {"routing": "token_choice", "balance_loss": 0.1}, {"routing": "token_choice", "dropless": True}],
    ids=["expert_choice", "capacity", "dropless"],
)
def test_recomputing_experts_keeps_less_and_changes_no_gradient(build, inputs, randn, changes):
    weight, gradients, kept = randn(2, 12, 32), [], []
    for recompute_moe in (False, True):
        block = build(1, recompute_moe=recompute_moe, router_input="timestep", **changes)
        leaves = [part.clone().requires_grad_() for part in inputs[:3]]
        elements, (y, routing) = saved_elements(lambda block=block, leaves=leaves: block(*leaves, MASK))
        kept.append(elements)
        loss = (y * weight).sum() + (0 if routing.balance is None else routing.balance.sum())
        gradients.append(torch.autograd.grad(loss, [*leaves, *block.parameters()]))
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.norm() > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)
    hidden = 2 * 12 * 2 * 128  # of the experts: images, tokens, experts per token, width
    assert kept[0] - kept[1] > hidden


def test_recomputing_experts_does_nothing_to_a_dense_layer(build, inputs):
    plain, recomputing = (build(0, recompute_moe=flag) for flag in (False, True))
    leaves = [part.requires_grad_() for part in inputs[:3]]
    (kept, _), (also_kept, _) = (saved_elements(lambda block=b: block(*leaves, MASK)) for b in (plain, recomputing))
    assert kept == also_kept


def test_modulation_chunks_a_linear_layer_of_silu(filled, region, randn):
    modulation, cond = filled(Modulation(8, 3, region)), randn(2, 8)
    whole = torch.nn.functional.silu(cond) @ modulation.linear.weight.T + modulation.linear.bias
    vectors = modulation(cond)
    assert [vector.shape for vector in vectors] == [(2, 1, 8)] * 3
    torch.testing.assert_close(torch.cat(vectors, dim=2)[:, 0], whole, rtol=0, atol=1e-14)


def test_modulate_scales_and_shifts_a_layer_norm(randn):
    x, shift, scale = 3 + 2 * randn(2, 5, 8), randn(2, 1, 8), randn(2, 1, 8)
    torch.testing.assert_close(normed(x), norm(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(modulate(normed(x), shift, scale), norm(x) * (1 + scale) + shift, rtol=0, atol=1e-14)
