"""The mixture-of-experts layer against a loop over images, experts and tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megadit.model.moe import ExpertChoiceMoE
from megadit.model.router import expert_choice


@pytest.fixture
def build(config, region, grid, filled):
    return lambda **changes: filled(ExpertChoiceMoE(replace(config, **changes), region, grid["ep"]))


def naive_moe(moe, x_BTD, capacity):
    """out[token] = sum over the experts that picked it of affinity x expert(token)."""
    rows = []
    for image in x_BTD:
        affinity = (image @ moe.router.weight.T).softmax(-1)
        outputs = [torch.zeros_like(token) for token in image]
        for expert, (up, down) in enumerate(zip(moe.experts.up, moe.experts.down, strict=True)):
            for token in affinity[:, expert].argsort(descending=True)[:capacity].tolist():
                hidden = F.gelu(image[token] @ up, approximate="tanh")
                outputs[token] = outputs[token] + affinity[token, expert] * (hidden @ down)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("experts", "capacity_factor", "capacity"), [(4, 2.0, 6), (4, 0.5, 2), (3, 1.0, 4), (1, 1.0, 12), (2, 5.0, 12)]
)
def test_output_and_gradients_equal_a_naive_loop(build, randn, experts, capacity_factor, capacity):
    moe, x, weight = build(experts=experts, capacity_factor=capacity_factor), randn(3, 12, 32), randn(3, 12, 32)
    x.requires_grad_()
    leaves = [x, *moe.parameters()]
    output, expected = moe(x), naive_moe(moe, x, capacity)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((output * weight).sum(), leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    assert len(leaves) == 4
    for gradient, want in zip(gradients, wanted, strict=True):
        # A lone expert's softmax is 1 whatever the weights: the router alone may have no gradient.
        assert experts == 1 or want.norm() > 0.1
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12)


def test_a_token_that_nobody_picks_gets_exactly_zero(build, randn):
    moe, x = build(capacity_factor=0.5), randn(3, 12, 32)
    picked = torch.zeros(3, 12, dtype=torch.bool)
    for image, index in enumerate(expert_choice(moe.router(x), 2).index_BEC):
        picked[image, index.flatten()] = True
    output = moe(x)
    assert 0 < picked.sum() < picked.numel()
    assert torch.all(output[~picked] == 0)
    assert torch.all(output[picked].norm(dim=-1) > 0)
    assert moe.stats.unpicked.item() == pytest.approx(1 - picked.double().mean().item(), abs=1e-15)


def test_permuting_the_batch_permutes_the_output(build, randn):
    moe, x, order = build(), randn(4, 12, 32), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(moe(x[order]), moe(x)[order], rtol=0, atol=1e-14)


def test_an_image_is_routed_by_itself(build, randn):
    moe, x = build(), randn(3, 12, 32)
    among_others = moe(torch.cat([10 * randn(2, 12, 32), x[:1]]))[2:]
    torch.testing.assert_close(among_others, moe(x)[:1], rtol=0, atol=1e-14)


def test_routing_follows_the_number_of_tokens_that_arrive(build, randn):
    moe, x = build(capacity_factor=1.0), randn(1, 20, 32)  # image_size stands for 16 tokens
    torch.testing.assert_close(moe(x), naive_moe(moe, x, 5), rtol=0, atol=1e-12)
