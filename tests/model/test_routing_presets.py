"""Each routing preset against where it comes from: diffusers, DeepSpeed, or the original's formula written out."""

import pytest
import torch
import torch.nn.functional as F

from megadit.model.config import ROUTING_PRESETS, ECDiTConfig
from megadit.model.moe import MoE
from megadit.model.router import normalise, seat, token_choice

LAYER = 3  # has experts under every preset


@pytest.fixture
def build(region, grid):
    """A function from a preset and changes to its layer, whose weights are normal of deviation 0.2."""

    def moe(preset, dtype=torch.float32, **changes):
        config = ECDiTConfig(layers=4, **(ROUTING_PRESETS[preset] | changes))
        layer = MoE(config, LAYER, region, grid["ep"]).to(dtype)
        with torch.no_grad():
            for seed, parameter in enumerate(layer.parameters()):
                parameter.copy_(0.2 * normal(seed, *parameter.shape))
        return layer

    return moe


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(*tensors):
    """The same values, apart from any graph."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def assert_close(found, wanted, tolerance=1e-5):
    """To `tolerance` of the largest element: in float32, sums of many terms cancel."""
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def in_diffusers_names(ours):
    """Parameters of a nucleus layer, or their gradients, as diffusers' layer has them; its two halves are fused."""
    return {
        "gate.weight": ours["router.weight"],
        "experts.gate_up_proj": torch.cat([ours["experts.gate"], ours["experts.up"]], dim=2),
        "experts.down_proj": ours["experts.down"],
        "shared_expert.net.0.proj.weight": torch.cat([ours["shared.up.weight"], ours["shared.gate.weight"]]),
        "shared_expert.net.2.weight": ours["shared.down.weight"],
    }


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("width", "tokens", "experts", "capacity_factor", "batch", "expert_ratio"),
    [
        (32, 20, 8, 2.0, 3, 0.65625),
        (48, 16, 4, 1.0, 1, 1.25),
        (64, 49, 16, 8.0, 2, 0.5),
        (16, 30, 5, 1.5, 4, 2.0),
        (24, 7, 3, 3.0, 5, 1.0),
        (128, 64, 64, 8.0, 2, 0.65625),
        (8, 1, 2, 2.0, 6, 4.0),
    ],
)
def test_nucleus_is_the_layer_of_diffusers(build, width, tokens, experts, capacity_factor, batch, expert_ratio, gate):
    """Output, and the gradients of the inputs and of every parameter."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    changes = {"width": width, "experts": experts, "capacity_factor": capacity_factor, "expert_ratio": expert_ratio}
    ours = build("nucleus", **changes, gate=gate)
    hidden, scale = ours.config.expert_hidden, ours.config.route_scale
    theirs = module.NucleusMoELayer(width, hidden, experts, capacity_factor, gate == "sigmoid", scale)
    theirs.load_state_dict(in_diffusers_names(ours.state_dict()))
    inputs = [normal(10, batch, tokens, width), normal(11, batch, tokens, width), normal(12, batch, width)]
    mine, others = (leaves(*(part.float() for part in inputs)) for _ in range(2))
    (output, _), expected = ours(*mine), theirs(*others)
    assert_close(output, expected)
    weight = normal(13, batch, tokens, width)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for part, other in zip(mine, others, strict=True):
        assert_close(part.grad, other.grad)
    gradients = in_diffusers_names({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert_close(gradients.pop(name), parameter.grad)
    assert not gradients


def deepspeed_layer(gating, moe, x_SD, router, up, down, capacity_factor, min_capacity):
    """(output, combine weights [S, E, C], balance loss) of one group, with DeepSpeed's gating around our experts."""
    loss, combine, dispatch, _ = gating(
        x_SD @ router.T, capacity_factor, min_capacity, drop_tokens=True, top2_2nd_expert_sampling=False
    )
    hidden = F.gelu(torch.einsum("sec,sm,emf->ecf", dispatch.float(), x_SD, up), approximate="tanh")
    return torch.einsum("sec,ecf,efm->sm", combine, hidden, down), combine, loss


def combine_weights(affinity_SE, capacity):
    """Ours, as DeepSpeed has them: [S, E, C], the gate of each token in its slot."""
    tokens, experts = affinity_SE.shape
    picks = normalise(seat(token_choice(affinity_SE[None], 2), experts, capacity), tokens)
    weights = torch.zeros(tokens, experts, capacity)
    for expert in range(experts):
        for slot in range(capacity):
            weights[picks.index_GEC[0, expert, slot], expert, slot] += picks.gate_GEC[0, expert, slot]
    return weights


@pytest.mark.parametrize("min_capacity", [0, 1])
@pytest.mark.parametrize(
    ("width", "tokens", "experts", "capacity_factor", "batch", "are_dropped"),
    [
        (32, 16, 4, 1.0, 2, True),
        (16, 64, 8, 1.0, 1, True),
        (24, 30, 5, 0.5, 3, True),
        (8, 20, 3, 0.25, 2, True),
        (16, 12, 2, 1.0, 2, False),
        (32, 40, 6, 3.0, 2, False),
    ],
)
def test_gshard_is_the_gating_of_deepspeed(
    build, width, tokens, experts, capacity_factor, batch, are_dropped, min_capacity
):
    """Combine weights, output, balance loss, and the gradients of the tokens and of every parameter."""
    gating = pytest.importorskip("deepspeed.moe.sharded_moe").top2gating
    moe = build("gshard", width=width, experts=experts, capacity_factor=capacity_factor)
    x = normal(10, batch, tokens, width).float()
    mine, others = leaves(x), leaves(x, *moe.parameters())
    output, routing = moe(mine[0], None, None)
    expected, losses, empty = [], [], 0
    for image in others[0]:
        out, combine, loss = deepspeed_layer(gating, moe, image, *others[1:], capacity_factor, min_capacity)
        ours = combine_weights((image @ moe.router.weight.T).softmax(-1), moe.config.capacity(LAYER, tokens))
        torch.testing.assert_close(ours, combine, rtol=0, atol=1e-6)
        expected.append(out)
        losses.append(loss)
        empty += 2 * tokens - combine.count_nonzero().item()
    assert (empty > 0) == are_dropped
    assert_close(output, torch.stack(expected))
    torch.testing.assert_close(routing.balance[0], sum(losses), rtol=1e-6, atol=0)
    weight = normal(13, batch, tokens, width)
    ((output * weight).sum() + 10 * routing.balance.sum()).backward()
    ((torch.stack(expected) * weight).sum() + 10 * sum(losses)).backward()
    for found, wanted in zip([*mine, *moe.parameters()], others, strict=True):
        assert_close(found.grad, wanted.grad)


def swiglu(x, up, gate, down):
    return (F.silu(x @ gate) * (x @ up)) @ down


def dit_moe(x_ND, router, up, gate, down, shared_up, shared_gate, shared_down, top_k):
    """(output, balance loss) of DiT-MoE's layer over all tokens of a microbatch (its MoEGate and SparseMoeBlock)."""
    scores_NE = (x_ND @ router.T).softmax(-1)
    num_tokens, experts = scores_NE.shape
    outputs, picks = [], [0] * experts
    for x, scores in zip(x_ND, scores_NE, strict=True):
        out = swiglu(x, shared_up.T, shared_gate.T, shared_down.T)
        for expert in sorted(range(experts), key=lambda expert: -scores[expert].item())[:top_k]:
            picks[expert] += 1
            out = out + scores[expert] * swiglu(x, up[expert], gate[expert], down[expert])
        outputs.append(out)
    means_E = scores_NE.mean(0)
    shares = [experts * count / (num_tokens * top_k) for count in picks]
    return torch.stack(outputs), sum(share * mean for share, mean in zip(shares, means_E, strict=True))


@pytest.mark.parametrize(
    ("width", "tokens", "experts", "top_k", "batch"), [(32, 16, 8, 2, 3), (16, 9, 4, 1, 4), (24, 5, 3, 3, 1)]
)
def test_dit_moe_is_its_formula(build, width, tokens, experts, top_k, batch):
    """Its top-2 scores are not normalised, its shared experts are one of twice the width, and it drops nothing."""
    assert ROUTING_PRESETS["dit-moe"]["routing_group"] == "batch"  # as many images as there are
    moe = build("dit-moe", torch.float64, width=width, experts=experts, top_k=top_k, routing_group=batch)
    names = ["router.weight", "experts.up", "experts.gate", "experts.down"]
    names += ["shared.up.weight", "shared.gate.weight", "shared.down.weight"]
    parameters = dict(moe.named_parameters())
    assert parameters.keys() == set(names) and moe.shared.down.weight.shape == (width, 2 * width)
    x, weight = normal(10, batch, tokens, width), normal(11, batch, tokens, width)
    mine, others = leaves(x), leaves(x, *(parameters[name] for name in names))
    output, routing = moe(mine[0], None, None)
    expected, loss = dit_moe(others[0].flatten(0, 1), *others[1:], top_k)
    torch.testing.assert_close(output, expected.view_as(x), rtol=1e-12, atol=1e-12)
    # The sum over images, which the objective divides by their number.
    torch.testing.assert_close(routing.balance[0] / batch, loss, rtol=1e-13, atol=0)
    assert routing.stats.picks == top_k
    alpha = moe.config.balance_loss
    ((output * weight).sum() + alpha * routing.balance[0] / batch).backward()
    ((expected.view_as(x) * weight).sum() + alpha * loss).backward()
    for found, wanted in zip([*mine, *(parameters[name] for name in names)], others, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-12)
