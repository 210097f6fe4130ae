"""The mixture-of-experts layer against a loop over groups, tokens and experts, for every way to route."""

from dataclasses import replace

import pytest
import torch

from megadit.model.config import ECDiTConfig
from megadit.model.moe import MoE
from megadit.model.router import expert_choice, seat, token_choice
from megadit.parallel.grid import Grid, Layout
from megadit.parallel.init import Normal, initialise
from megadit.parallel.tensor.mappings import ReplicatedTokens
from tests.model import naive
from tests.parallel.places import Place
from tests.parity.cases import pairwise
from tests.ranks import run_ranks

LAYER = 3
WAYS = {
    "expert_choice": {},
    "capacity": {"routing": "token_choice", "capacity_factor": 1.0},
    "dropless": {"routing": "token_choice", "dropless": True},
}
AXES = {
    "way": tuple(WAYS),
    "routing_group": ("sample", 2, 4),
    "gate": ("softmax", "sigmoid", "identity"),
    "normalise_gates": (False, True),
    "route_scale": (1.0, 2.5),
    "router_input": ("modulated", "timestep"),
    "shared_experts": (0, 2),
    "feedforward": ("gelu", "swiglu"),
    "expert_ratio": (0.0, 1.5),
    "top_k": (1, 2, 3),
    "capacity_overrides": ({}, {LAYER: 0.5}),
}


def makes_sense(gate, normalise_gates, **_):
    """A sum of logits may be next to nothing: nobody should divide by it."""
    return not (normalise_gates and gate == "identity")


def combinations():
    """Few that hold every two values of two axes, and the configuration's changes of each."""
    hashable = AXES | {"capacity_overrides": (0, 1)}
    for values in pairwise(hashable, makes_sense):
        overrides = AXES["capacity_overrides"][values["capacity_overrides"]]
        way = WAYS[values.pop("way")]
        yield way | values | {"capacity_overrides": overrides}


def name_of(changes):
    return "-".join(str(value) for value in changes.values() if value not in (0, {}, False, 1.0)).replace(" ", "")


@pytest.fixture
def build(config, region, grid, filled):
    return lambda **changes: filled(MoE(replace(config, **changes), LAYER, region, grid["ep"]))


@pytest.fixture
def inputs(randn):
    """A function of the number of images and tokens: (modulated tokens, unmodulated ones, conditioning)."""
    return lambda images=4, tokens=12: (randn(images, tokens, 32), randn(images, tokens, 32), randn(images, 32))


def assert_equals_naive(moe, inputs, randn):
    """Output, balance loss, statistics, and the gradients of inputs and parameters."""
    leaves = [part.requires_grad_() for part in inputs] + list(moe.parameters())
    weight = randn(*inputs[0].shape)
    output, routing = moe(*inputs)
    expected, taken, loss = naive.mixture(moe, LAYER, *inputs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    total, wanted = (output * weight).sum(), (expected * weight).sum()
    if moe.config.balance_loss:
        assert routing.balance.shape == (1,)
        torch.testing.assert_close(routing.balance[0], loss, rtol=1e-12, atol=0)
        total, wanted = total + 3 * routing.balance.sum(), wanted + 3 * loss
    else:
        assert routing.balance is None
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
    wanted = torch.autograd.grad(wanted, leaves, materialize_grads=True, allow_unused=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-11, atol=1e-11)
    assert_statistics(routing.stats, taken, moe.config.experts)
    assert routing.takers_GS.dtype == torch.int64 and not routing.takers_GS.requires_grad
    assert routing.takers_GS.tolist() == [[len(of_token) for of_token in group] for group in taken]
    return dict(zip(["x", "plain", "cond", *(name for name, _ in moe.named_parameters())], wanted, strict=True))


def assert_statistics(stats, taken, experts):
    """`taken[group][token]`: the experts that computed the token."""
    counts = [[len(of_token) for of_token in group] for group in taken]
    flat = [count for group in counts for count in group]
    load = [sum(expert in of_token for group in taken for of_token in group) for expert in range(experts)]
    assert stats.picks.item() == pytest.approx(sum(flat) / len(flat), rel=1e-14)
    assert stats.unpicked.item() == pytest.approx(flat.count(0) / len(flat), rel=1e-14)
    assert stats.busiest.item() == pytest.approx(sum(map(max, counts)) / len(counts), rel=1e-14)
    assert stats.load_E.tolist() == pytest.approx([experts * count / sum(load) for count in load], rel=1e-14)


@pytest.mark.parametrize("changes", list(combinations()), ids=name_of)
def test_output_and_gradients_equal_a_naive_loop(build, inputs, randn, changes):
    moe = build(**changes)
    gradients = assert_equals_naive(moe, inputs(), randn)
    reads_time = moe.config.router_input == "timestep"
    for name, gradient in gradients.items():
        # One expert of a token, normalised, has the gate 1 whatever the router says.
        is_constant = moe.config.normalise_gates and moe.config.routing == "token_choice" and moe.config.top_k == 1
        unused = name in ("plain", "cond") and not reads_time
        idle = is_constant and name in ("plain", "cond", "router.weight")
        assert (gradient.norm() > 0.05) == (not unused and not idle), name


@pytest.mark.parametrize("counts", ["picks", "first"])
@pytest.mark.parametrize("router_input", ["modulated", "timestep"])
@pytest.mark.parametrize("way", ["capacity", "dropless"])
@pytest.mark.parametrize("routing_group", ["sample", 2])
def test_balance_loss_sums_over_images_and_reaches_what_the_router_reads(
    build, inputs, randn, way, router_input, counts, routing_group
):
    changes = WAYS[way] | {"router_input": router_input, "balance_counts": counts, "routing_group": routing_group}
    moe, batch = build(**changes, balance_loss=0.1), inputs()
    assert_equals_naive(moe, batch, randn)
    gradients = torch.autograd.grad(moe(*batch)[1].balance, [*batch, moe.router.weight], allow_unused=True)
    reads = [False, True, True, True] if router_input == "timestep" else [True, False, False, True]
    assert [gradient is not None and gradient.norm().item() > 1e-3 for gradient in gradients] == reads


@pytest.mark.parametrize(
    ("experts", "capacity_factor"), [(4, 2.0), (4, 0.5), (3, 1.0), (1, 1.0), (2, 5.0)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_experts_and_any_capacity(build, inputs, randn, way, experts, capacity_factor):
    changes = WAYS[way] | {"experts": experts, "capacity_factor": capacity_factor, "top_k": min(2, experts)}
    assert_equals_naive(build(**changes), inputs(), randn)


def cut_over_ranks(rank, world_size, changes):
    """Output and gradient of this rank's images, with experts cut as [ep, tp, local], and with all of them here."""
    config = ECDiTConfig(width=32, experts=8, **changes)
    found = []
    for grid in (Grid(Layout(pp=1, edp=1, ep=2, tp=2), rank), Place(Layout(1, 1, 1, 1), 0)):
        moe = MoE(config, LAYER, ReplicatedTokens(grid["tp"]), grid["ep"]).double()
        initialise(moe.named_parameters(), grid, 1, lambda name: Normal(0.2))
        generator = torch.Generator().manual_seed(rank // 2)  # tensor ranks see the same images
        x_BTD, weight_BTD = torch.randn(2, 2, 12, 32, dtype=torch.float64, generator=generator)
        output, _ = moe(x_BTD.requires_grad_(), x_BTD, x_BTD[:, 0])
        found.append((output, *torch.autograd.grad((output * weight_BTD).sum(), [x_BTD])))
    for cut, whole in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_experts_of_four_ranks_compute_what_they_do_on_one(way):
    run_ranks(cut_over_ranks, 4, WAYS[way] | {"shared_experts": 1, "normalise_gates": True})


@pytest.mark.parametrize("way", WAYS)
def test_routing_follows_the_number_of_tokens_that_arrive(build, inputs, randn, way):
    moe = build(**WAYS[way])
    for tokens in (1, 5, 20):  # image_size stands for 16
        assert_equals_naive(moe, inputs(2, tokens), randn)


def test_a_token_that_nobody_picks_gets_exactly_zero(build, inputs):
    moe, (x, plain, cond) = build(capacity_factor=0.5), inputs(3)
    picked = torch.zeros(3, 12, dtype=torch.bool)
    for image, index in enumerate(expert_choice(moe.router(x).softmax(-1), 2).index_GEC):
        picked[image, index.flatten()] = True
    output, routing = moe(x, plain, cond)
    assert 0 < picked.sum() < picked.numel()
    assert torch.all(output[~picked] == 0)
    assert torch.all(output[picked].norm(dim=-1) > 0)
    assert routing.stats.unpicked.item() == pytest.approx(1 - picked.double().mean().item(), abs=1e-15)


def test_a_token_that_is_dropped_gets_exactly_zero(build, inputs):
    """Token 0, in whose place empty slots are computed, is not among them."""
    moe, (x, plain, cond) = build(**WAYS["capacity"] | {"capacity_factor": 0.5}), inputs(3)
    seated = torch.zeros(3, 12, dtype=torch.bool)
    picks = seat(token_choice(moe.router(x).softmax(-1), 2), 4, 3)
    for image in range(3):
        seated[image, picks.index_GEC[image][picks.taken_GEC[image]]] = True
    output, routing = moe(x, plain, cond)
    assert 0 < seated.sum() < seated.numel() and not picks.taken_GEC.all()
    assert torch.all(output[~seated] == 0)
    assert torch.all(output[seated].norm(dim=-1) > 0)
    assert routing.stats.unpicked.item() == pytest.approx(1 - seated.double().mean().item(), abs=1e-15)


def test_without_a_capacity_every_token_gets_what_it_asks_for(build, inputs):
    """As with a capacity so large that nothing is dropped."""
    batch = inputs()
    roomy, dropless = build(**WAYS["capacity"] | {"capacity_factor": 4.0}), build(**WAYS["dropless"])
    (output, routing), (expected, wanted) = dropless(*batch), roomy(*batch)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    assert (routing.stats.picks, routing.stats.unpicked, routing.stats.busiest) == (2.0, 0.0, 2.0)
    for value, want in zip(routing.stats, wanted.stats, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_permuting_the_batch_permutes_the_output(build, inputs, way):
    moe, batch, order = build(**WAYS[way], router_input="timestep"), inputs(), torch.tensor([2, 0, 3, 1])
    permuted = moe(*(part[order] for part in batch))[0]
    torch.testing.assert_close(permuted, moe(*batch)[0][order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("way", ["expert_choice", "capacity"])
def test_images_compete_within_their_group_alone(build, inputs, way):
    first, second = inputs(2), [10 * part for part in inputs(2)]
    pairs = build(**WAYS[way], routing_group=2)
    among_others = pairs(*map(torch.cat, zip(second, first, strict=True)))[0][2:]
    torch.testing.assert_close(among_others, pairs(*first)[0], rtol=0, atol=1e-13)
    alone = build(**WAYS[way])(*first)[0]
    assert (alone - pairs(*first)[0]).abs().max() > 0.1


def test_a_layer_without_overrides_keeps_its_capacity(build, inputs):
    """The number of a layer, not its place in a stage, is what an override names."""
    batch, plain = inputs(), build()
    others = build(capacity_overrides={LAYER - 2: 0.5})
    assert torch.equal(others(*batch)[0], plain(*batch)[0])
    assert plain(*batch)[1].stats.picks == 2.0
    assert build(capacity_overrides={LAYER: 1.0})(*batch)[1].stats.picks == 1.0


def test_bfloat16_tokens_give_bfloat16_outputs(build, inputs):
    for way in WAYS.values():
        moe = build(**way, normalise_gates=True, shared_experts=1).to(torch.bfloat16)
        output, routing = moe(*(part.to(torch.bfloat16) for part in inputs()))
        assert output.dtype == torch.bfloat16
        assert {value.dtype for value in routing.stats} == {torch.float32}
