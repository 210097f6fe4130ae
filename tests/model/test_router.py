"""Routing as functions of values, against loops over tokens: who computes what, with which weight."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.model.router import (
    GATES,
    Choices,
    Router,
    balance_loss,
    expert_choice,
    normalise,
    router_stats,
    seat,
    token_choice,
)
from tests.model import naive

drawn = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@st.composite
def affinities(draw, levels=0):
    """Positive affinity [G, S, E]; with `levels`, that many different scores, so that there are ties."""
    shape = tuple(draw(st.integers(1, largest)) for largest in (3, 10, 5))
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))), dtype=torch.float64)
    return ((scores * levels).floor() + 1) / (levels + 1) if levels else scores + 0.01


def capacities(affinity):
    """From one token to all of a group."""
    return st.integers(1, affinity.shape[1])


def numbers_of_choices(affinity):
    """From one expert to all."""
    return st.integers(1, affinity.shape[2])


@drawn
@given(st.data())
def test_expert_choice_equals_a_naive_loop(data):
    affinity = data.draw(affinities())
    capacity = data.draw(capacities(affinity))
    picks = expert_choice(affinity, capacity)
    groups, tokens, experts = affinity.shape
    assert picks.index_GEC.shape == picks.gate_GEC.shape == picks.taken_GEC.shape == (groups, experts, capacity)
    assert picks.taken_GEC.dtype == torch.bool and picks.taken_GEC.all()
    for group in range(groups):
        for expert in range(experts):
            chosen = picks.index_GEC[group, expert].tolist()
            assert set(chosen) == set(naive.best_tokens(affinity[group, :, expert].tolist(), capacity))
            assert picks.gate_GEC[group, expert].tolist() == [affinity[group, t, expert].item() for t in chosen]


@drawn
@given(st.data())
def test_ties_still_give_distinct_tokens_none_worse_than_one_left_out(data):
    affinity = data.draw(affinities(levels=data.draw(st.integers(1, 3))))
    capacity = data.draw(capacities(affinity))
    picks = expert_choice(affinity, capacity)
    for group, group_picks in enumerate(picks.index_GEC):
        for expert, index in enumerate(group_picks.tolist()):
            assert len(set(index)) == capacity
            scores = affinity[group, :, expert].tolist()
            left_out = [score for token, score in enumerate(scores) if token not in index]
            assert min(scores[token] for token in index) >= max(left_out, default=0.0)
            assert picks.gate_GEC[group, expert].tolist() == [scores[token] for token in index]


@pytest.mark.parametrize(
    ("tokens", "experts", "capacity"),
    [(8, 4, 3), (8, 1, 2), (5, 3, 5), (1, 1, 1), (1, 4, 1)],
    ids=["several", "lone_expert", "capacity_of_all", "one_token", "one_token_for_all"],
)
def test_equal_scores_give_each_expert_distinct_tokens(tokens, experts, capacity):
    picks = expert_choice(torch.full((2, tokens, experts), 0.25), capacity)
    assert picks.index_GEC.shape == (2, experts, capacity)
    for index in picks.index_GEC.flatten(0, 1).tolist():
        assert len(set(index)) == capacity and set(index) <= set(range(tokens))


def test_the_gate_sends_its_gradient_to_the_picked_affinities_alone(randn):
    affinity = randn(2, 7, 3).softmax(-1).requires_grad_()
    weight = randn(2, 3, 2)
    picks = expert_choice(affinity, 2)
    (picks.gate_GEC * weight).sum().backward()
    expected = torch.zeros_like(affinity)
    for group in range(2):
        for expert in range(3):
            for place, token in enumerate(picks.index_GEC[group, expert]):
                expected[group, token, expert] = weight[group, expert, place]
    assert torch.equal(affinity.grad, expected)


@drawn
@given(st.data())
def test_token_choice_equals_a_naive_loop(data):
    affinity = data.draw(affinities())
    top_k = data.draw(numbers_of_choices(affinity))
    choices = token_choice(affinity, top_k)
    for group, scores in enumerate(affinity.tolist()):
        assert choices.expert_GSK[group].tolist() == [naive.best_experts(row, top_k) for row in scores]
        assert choices.gate_GSK[group].tolist() == [sorted(row, reverse=True)[:top_k] for row in scores]


@drawn
@given(st.data())
def test_a_token_with_ties_asks_for_distinct_experts_none_worse_than_one_left_out(data):
    affinity = data.draw(affinities(levels=data.draw(st.integers(1, 3))))
    top_k = data.draw(numbers_of_choices(affinity))
    choices = token_choice(affinity, top_k)
    rows = affinity.flatten(0, 1).tolist()
    for scores, asked, gates in zip(
        rows, choices.expert_GSK.flatten(0, 1).tolist(), choices.gate_GSK.flatten(0, 1).tolist(), strict=True
    ):
        assert len(set(asked)) == top_k
        assert gates == [scores[expert] for expert in asked] == sorted(scores, reverse=True)[:top_k]


@drawn
@given(st.data())
def test_seats_go_to_first_choices_in_token_order_then_to_second_ones(data):
    """With ties, and with all scores equal, where every token asks for the same experts."""
    affinity = data.draw(affinities(levels=data.draw(st.integers(0, 3))))
    if data.draw(st.booleans()):
        affinity = torch.ones_like(affinity)
    groups, tokens, experts = affinity.shape
    choices = token_choice(affinity, data.draw(numbers_of_choices(affinity)))
    capacity = data.draw(capacities(affinity))
    picks = seat(choices, experts, capacity)
    assert picks.index_GEC.shape == picks.gate_GEC.shape == picks.taken_GEC.shape == (groups, experts, capacity)
    assert picks.taken_GEC.dtype == torch.bool
    for group in range(groups):
        seated = naive.seats(choices.expert_GSK[group].tolist(), experts, capacity)
        for expert, expected in enumerate(seated):
            empty = capacity - len(expected)
            index, gate, taken = (part[group, expert].tolist() for part in picks)
            assert index == [token for token, _ in expected] + [0] * empty
            assert gate == [affinity[group, token, expert].item() for token, _ in expected] + [0.0] * empty
            assert taken == [True] * len(expected) + [False] * empty


def test_seats_by_hand():
    """Experts of two seats. Tokens 0, 1 and 2 ask for expert 0 first, so 2 is too late; so is 1, after 3 and 0."""
    choices = Choices(
        torch.tensor([[[0, 1], [0, 1], [0, 1], [1, 0]]]),
        torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]]),
    )
    index, gate, taken = seat(choices, 3, 2)
    assert index.tolist() == [[[0, 1], [3, 0], [0, 0]]]
    torch.testing.assert_close(gate, torch.tensor([[[0.9, 0.8], [0.6, 0.1], [0.0, 0.0]]]), rtol=0, atol=0)
    assert taken.tolist() == [[[True, True], [True, True], [False, False]]]


def naive_gates(gate_SK, expert_SK, experts, capacity, is_normal):
    """The gates [E, C] of one group's seats, made of the wishes' gates one by one."""
    seated = naive.seats(expert_SK.tolist(), experts, capacity)
    totals = [gate_SK.new_zeros(()) for _ in gate_SK]
    for token, choice in itertools.chain(*seated):
        totals[token] = totals[token] + gate_SK[token, choice]
    rows = []
    for of_expert in seated:
        gates = [
            gate_SK[token, choice] / (totals[token] + naive.EPSILON if is_normal else 1) for token, choice in of_expert
        ]
        rows.append(torch.stack(gates + [gate_SK.new_zeros(())] * (capacity - len(gates))))
    return torch.stack(rows)


@drawn
@given(st.data(), st.booleans())
def test_gates_of_seats_and_their_gradients_equal_a_naive_loop(data, is_normal):
    affinity = data.draw(affinities())
    groups, tokens, experts = affinity.shape
    choices = token_choice(affinity, data.draw(numbers_of_choices(affinity)))
    capacity = data.draw(capacities(affinity))
    gate_GSK = choices.gate_GSK.clone().requires_grad_()
    picks = seat(choices._replace(gate_GSK=gate_GSK), experts, capacity)
    gate_GEC = (normalise(picks, tokens) if is_normal else picks).gate_GEC
    expected_GEC = torch.stack(
        [
            naive_gates(gates, asked, experts, capacity, is_normal)
            for gates, asked in zip(gate_GSK, choices.expert_GSK, strict=True)
        ]
    )
    torch.testing.assert_close(gate_GEC, expected_GEC, rtol=1e-13, atol=0)
    weight = torch.arange(1.0, 1 + gate_GEC.numel(), dtype=torch.float64).view_as(gate_GEC)
    (grad,) = torch.autograd.grad((gate_GEC * weight).sum(), gate_GSK)
    (expected,) = torch.autograd.grad((expected_GEC * weight).sum(), gate_GSK)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-10)


@drawn
@given(st.data())
def test_normalised_gates_of_a_token_sum_to_one_over_the_experts_that_took_it(data):
    affinity = data.draw(affinities()).requires_grad_()
    groups, tokens, experts = affinity.shape
    picks = expert_choice(affinity, data.draw(capacities(affinity)))
    normal = normalise(picks, tokens)
    assert normal.index_GEC is picks.index_GEC and normal.taken_GEC is picks.taken_GEC
    weight = torch.arange(1.0, 1 + picks.gate_GEC.numel(), dtype=torch.float64).view_as(picks.gate_GEC)
    expected = torch.zeros((), dtype=torch.float64)
    for group in range(groups):
        for token in range(tokens):
            slots = (picks.index_GEC[group] == token).nonzero().tolist()
            total = sum(affinity[group, token, expert] for expert, _ in slots)
            gates = [normal.gate_GEC[group, expert, place] for expert, place in slots]
            assert not slots or sum(gates).item() == pytest.approx(1.0, rel=1e-9)
            for (expert, place), gate in zip(slots, gates, strict=True):
                wanted = affinity[group, token, expert] / (total + naive.EPSILON)
                assert gate.item() == pytest.approx(wanted.item(), rel=1e-13)
                expected = expected + weight[group, expert, place] * wanted
    (grad,) = torch.autograd.grad((normal.gate_GEC * weight).sum(), affinity)
    (wanted,) = torch.autograd.grad(expected, affinity)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-10)


@drawn
@given(st.data(), st.sampled_from(["picks", "first"]))
def test_balance_loss_and_its_gradient_equal_a_naive_loop(data, counts):
    affinity = data.draw(affinities(levels=data.draw(st.integers(0, 3))))
    groups, _, experts = affinity.shape
    logits = affinity.log().requires_grad_()
    choices = token_choice(affinity, data.draw(numbers_of_choices(affinity)))
    loss = balance_loss(logits.softmax(-1).mean(dim=1), choices, counts)
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = torch.stack(
        [naive.balance(probabilities[g], choices.expert_GSK[g].tolist(), counts) for g in range(groups)]
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    weight = torch.arange(1.0, 1 + groups, dtype=torch.float64)
    (grad,) = torch.autograd.grad((loss * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), logits)
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)
    assert experts > 1 or loss.tolist() == pytest.approx([1.0] * groups, rel=1e-14)


@pytest.mark.parametrize("counts", ["picks", "first"])
def test_balance_loss_is_one_when_even_and_the_number_of_experts_when_one_gets_all(counts):
    even = Choices(torch.tensor([[[0, 1], [1, 2], [2, 0]]]), torch.zeros(1, 3, 2))
    alone = Choices(torch.tensor([[[1], [1], [1]]]), torch.zeros(1, 3, 1))
    assert balance_loss(torch.full((1, 3), 1 / 3), even, counts).item() == pytest.approx(1.0)
    assert balance_loss(torch.tensor([[0.0, 1.0, 0.0]]), alone, counts).item() == pytest.approx(3.0)


def test_the_two_counts_of_the_balance_loss_differ():
    choices = Choices(torch.tensor([[[0, 1], [0, 1]]]), torch.zeros(1, 2, 2))
    probability = torch.tensor([[0.75, 0.25]])
    assert balance_loss(probability, choices, "picks").item() == pytest.approx(1.0)
    assert balance_loss(probability, choices, "first").item() == pytest.approx(1.5)


def test_logits_are_products_with_the_routers_rows(filled, randn):
    router, x = filled(Router(6, 5, ())), randn(2, 4, 6)
    expected = torch.einsum("btd,ed->bte", x, router.weight)
    torch.testing.assert_close(router(x), expected, rtol=0, atol=1e-14)


def test_conditioning_is_joined_in_front_of_every_token(filled, randn):
    router, x, cond = filled(Router(9, 5, ())), randn(2, 4, 6), randn(2, 3)
    joined = torch.cat([cond[:, None].expand(-1, 4, -1), x], dim=2)
    torch.testing.assert_close(router(x, cond), joined @ router.weight.T, rtol=0, atol=1e-14)


def test_gates_are_their_formulas(randn):
    logits = randn(2, 4, 5)
    exponents = logits.exp()
    close = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(GATES["softmax"](logits), exponents / exponents.sum(-1, keepdim=True), **close)
    torch.testing.assert_close(GATES["sigmoid"](logits), exponents / (1 + exponents), **close)
    assert torch.equal(GATES["identity"](logits), logits)


@pytest.mark.parametrize("has_cond", [False, True])
def test_logits_of_half_precision_tokens_are_float32(grid, randn, has_cond):
    x, cond = randn(1, 64, 6).to(torch.bfloat16), randn(1, 6).to(torch.bfloat16)
    router = Router(12 if has_cond else 6, 5, ()).to(torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(randn(*router.weight.shape))
    logits = router(x, cond) if has_cond else router(x)
    assert logits.dtype == torch.float32
    assert logits[..., 0].unique().numel() == 64  # bfloat16 has 8 bits: these would tie


@drawn
@given(st.data())
def test_statistics_equal_a_naive_count(data):
    groups, images, tokens, experts = (data.draw(st.integers(1, largest)) for largest in (3, 2, 5, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randn(groups * images, tokens, experts, generator=generator, dtype=torch.float64)
    # taken[group][expert]: the tokens that it took
    taken = [[data.draw(st.sets(st.integers(0, images * tokens - 1))) for _ in range(experts)] for _ in range(groups)]
    takers = [[sum(token in of for of in group) for token in range(images * tokens)] for group in taken]
    load = [sum(len(group[expert]) for group in taken) for expert in range(experts)]
    stats = router_stats(logits, torch.tensor(takers), torch.tensor(load))
    counts = [count for group in takers for count in group]
    assert stats.picks.item() == pytest.approx(sum(counts) / len(counts), rel=1e-14)
    assert stats.unpicked.item() == pytest.approx(counts.count(0) / len(counts), rel=1e-14)
    assert stats.busiest.item() == pytest.approx(sum(map(max, takers)) / groups, rel=1e-14)
    if experts > 1:
        rows = logits.softmax(-1).flatten(0, 1).tolist()
        entropies = [-sum(p * math.log(p) for p in row) for row in rows]
        assert stats.entropy.item() == pytest.approx(sum(entropies) / len(rows) / math.log(experts), rel=1e-12)
    if any(load):
        wanted = [count * experts / sum(load) for count in load]
        assert stats.load_E.tolist() == pytest.approx(wanted, rel=1e-14)
    else:
        assert stats.load_E.tolist() == [0.0] * experts


@pytest.mark.parametrize(("experts", "entropy"), [(4, 1.0), (1, 0.0)], ids=["uniform", "lone_expert"])
def test_entropy_of_even_logits(experts, entropy):
    logits = torch.full((2, 6, experts), 3.0, dtype=torch.float64)
    stats = router_stats(logits, torch.full((2, 6), experts), torch.full((experts,), 12))
    assert stats.entropy.item() == pytest.approx(entropy, abs=1e-14)
    assert (stats.picks.item(), stats.unpicked.item(), stats.busiest.item()) == (experts, 0.0, experts)
    assert stats.load_E.tolist() == [1.0] * experts


def test_statistics_carry_no_gradient(randn):
    logits = randn(1, 4, 3).requires_grad_()
    assert not any(value.requires_grad for value in router_stats(logits, torch.ones(1, 4), torch.ones(3)))
