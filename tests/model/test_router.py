"""Expert choice against its definition: every expert keeps its best tokens of each image."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.model.router import Router, expert_choice, router_stats


def naive_choice(scores, capacity):
    """The tokens of one expert, from its score for each token of one image."""
    best_first = sorted(range(len(scores)), key=lambda token: scores[token], reverse=True)
    return set(best_first[:capacity])


@st.composite
def affinities(draw, levels=None):
    """(affinity [B, T, E], capacity); with `levels`, that many different scores, so that there are ties."""
    shape = tuple(draw(st.integers(1, largest)) for largest in (3, 10, 5))
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))), dtype=torch.float64)
    if levels:
        scores = (scores * levels).floor() / levels
    return scores, draw(st.integers(1, shape[1]))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(affinities())
def test_expert_choice_equals_a_naive_loop(case):
    affinity, capacity = case
    picks = expert_choice(affinity, capacity)
    batch, tokens, experts = affinity.shape
    assert picks.index_BEC.shape == picks.gate_BEC.shape == (batch, experts, capacity)
    for image in range(batch):
        for expert in range(experts):
            chosen = picks.index_BEC[image, expert].tolist()
            assert set(chosen) == naive_choice(affinity[image, :, expert].tolist(), capacity)
            assert picks.gate_BEC[image, expert].tolist() == [affinity[image, t, expert].item() for t in chosen]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(affinities(levels=2))
def test_ties_still_give_distinct_tokens_none_worse_than_one_left_out(case):
    affinity, capacity = case
    picks = expert_choice(affinity, capacity)
    for image, image_picks in enumerate(picks.index_BEC):
        for expert, index in enumerate(image_picks.tolist()):
            assert len(set(index)) == capacity
            scores = affinity[image, :, expert].tolist()
            left_out = [score for token, score in enumerate(scores) if token not in index]
            assert min(scores[token] for token in index) >= max(left_out, default=0.0)


@pytest.mark.parametrize(
    ("tokens", "experts", "capacity"),
    [(8, 4, 3), (8, 1, 2), (5, 3, 5), (1, 1, 1), (1, 4, 1)],
    ids=["several", "lone_expert", "capacity_of_all", "one_token", "one_token_for_all"],
)
def test_equal_scores_give_each_expert_distinct_tokens(tokens, experts, capacity):
    picks = expert_choice(torch.full((2, tokens, experts), 0.25), capacity)
    assert picks.index_BEC.shape == (2, experts, capacity)
    for index in picks.index_BEC.flatten(0, 1).tolist():
        assert len(set(index)) == capacity and set(index) <= set(range(tokens))


def test_the_gate_sends_its_gradient_to_the_picked_affinities_alone(randn):
    affinity = randn(2, 7, 3).softmax(-1).requires_grad_()
    weight = randn(2, 3, 2)
    picks = expert_choice(affinity, 2)
    (picks.gate_BEC * weight).sum().backward()
    expected = torch.zeros_like(affinity)
    for image in range(2):
        for expert in range(3):
            for place, token in enumerate(picks.index_BEC[image, expert]):
                expected[image, token, expert] = weight[image, expert, place]
    assert torch.equal(affinity.grad, expected)


def test_affinity_is_a_softmax_over_experts(filled, randn):
    router, x = filled(Router(6, 5, ())), randn(2, 4, 6)
    logits = torch.einsum("btd,ed->bte", x, router.weight)
    expected = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(router(x), expected, rtol=0, atol=1e-14)


def test_affinity_of_half_precision_tokens_is_float32(grid, randn):
    router = Router(6, 5, ()).to(torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(randn(5, 6))
    x = randn(1, 64, 6).to(torch.bfloat16)
    affinity = router(x)
    assert affinity.dtype == torch.float32
    assert affinity[..., 0].unique().numel() == 64  # bfloat16 has 8 bits: these would tie


def test_statistics_equal_a_naive_count(randn):
    affinity = (3 * randn(3, 8, 4)).softmax(-1)
    picks = expert_choice(affinity, 2)
    takers = [[sum(t in chosen for chosen in image.tolist()) for t in range(8)] for image in picks.index_BEC]
    counts = [count for image in takers for count in image]
    entropies = [-sum(a * math.log(a) for a in token) for token in affinity.flatten(0, 1).tolist()]
    stats = router_stats(affinity, picks)
    assert 0 < counts.count(0) < len(counts)
    assert stats.unpicked.item() == pytest.approx(counts.count(0) / len(counts), rel=1e-15)
    assert stats.busiest.item() == max(counts) > 1
    assert stats.entropy.item() == pytest.approx(sum(entropies) / len(entropies) / math.log(4), rel=1e-12)


@pytest.mark.parametrize(("experts", "entropy"), [(4, 1.0), (1, 0.0)], ids=["uniform", "lone_expert"])
def test_entropy_of_even_affinities(experts, entropy):
    affinity = torch.full((2, 6, experts), 1 / experts, dtype=torch.float64)
    picks = expert_choice(affinity, 6)
    stats = router_stats(affinity, picks)
    assert stats.entropy.item() == pytest.approx(entropy, abs=1e-14)
    assert (stats.unpicked.item(), stats.busiest.item()) == (0.0, experts)
