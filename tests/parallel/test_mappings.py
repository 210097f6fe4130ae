"""The regions of tensor parallelism: each pair alone, and a network of them against the uncut one."""

import pytest
import torch
import torch.nn.functional as F

from megadit.parallel.grid import Grid, Layout
from megadit.parallel.tensor.mappings import CutTokens, ReplicatedTokens, enter
from tests.ranks import run_ranks

RANKS = 2
SHAPE = (3, 4, 6)  # B, T, D
REGIONS = [ReplicatedTokens, CutTokens]


def numbers(seed, *shape, whole=False):
    generator = torch.Generator().manual_seed(seed)
    if whole:  # sums are exact
        return torch.randint(-99, 99, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def part(x, rank, dim):
    return x.chunk(RANKS, dim)[rank]


def pairs(rank, world_size, region_of):
    """Each mapping's output and gradient on this rank, from what every rank brings."""
    group = Grid(Layout(1, 1, 1, world_size), rank)["tp"]
    region = region_of(group)
    x = [numbers(i, *SHAPE, whole=True) for i in range(RANKS)]
    whole_x, sum_x = torch.cat(x, 1), sum(x)
    is_cut = region_of is CutTokens

    # name: (mapping, forward, backward of the gradients of all ranks)
    def on_tokens(grads):
        return part(sum(grads), rank, 1) if is_cut else sum(grads)

    def on_features(grads):
        return part(sum(grads) if is_cut else grads[rank], rank, -1)

    expected = {
        "enter": (whole_x if is_cut else x[rank], on_tokens),
        "leave": (
            part(sum_x, rank, 1) if is_cut else sum_x,
            (lambda grads: torch.cat(grads, 1)) if is_cut else (lambda grads: grads[rank]),
        ),
        "gather_features": (torch.cat(x, -1), on_features),
        "split_tokens": (
            part(x[rank], rank, 1) if is_cut else x[rank],
            (lambda grads: torch.cat(grads, 1)) if is_cut else (lambda grads: grads[rank]),
        ),
        "collect_tokens": (
            whole_x if is_cut else x[rank],
            (lambda grads: part(grads[rank], rank, 1)) if is_cut else (lambda grads: grads[rank]),
        ),
    }
    # Of a sum over the tokens that a rank holds: where it holds all, it is the sum already.
    expected["sum_tokens"] = (sum_x if is_cut else x[rank], lambda grads: grads[rank])
    # Of an entered tensor, whose gradient is summed over the ranks: work that all of them repeat counts once.
    expected["count_once"] = (x[rank], lambda grads: grads[rank] / (1 if is_cut else RANKS))
    # Of a replicated tensor: where each rank holds its own tokens, its gradient is only their part.
    expected["enter_between"] = (x[rank], lambda grads: sum(grads) if is_cut else grads[rank])
    mappings = {name: getattr(region, name) for name in expected}
    # The entrance of replicated tensors is the same in both regions.
    mappings["plain enter"], expected["plain enter"] = lambda x: enter(x, group), (x[rank], sum)
    faults = []
    for name, (forward, backward) in expected.items():
        mine = x[rank].clone().requires_grad_()
        out = mappings[name](mine)
        grads = [numbers(10 + i, *out.shape, whole=True) for i in range(RANKS)]
        (grad,) = torch.autograd.grad(out, mine, grads[rank])
        if not torch.equal(out, forward):
            faults.append(f"{name}: forward")
        if not torch.equal(grad, backward(grads)):
            faults.append(f"{name}: backward")
        if not torch.equal(mine, x[rank]) or not torch.equal(grads[rank], numbers(10 + rank, *out.shape, whole=True)):
            faults.append(f"{name}: an argument changed")
    return faults


@pytest.mark.parametrize("region_of", REGIONS)
def test_each_pair_is_the_collective_that_its_name_says(region_of):
    assert run_ranks(pairs, RANKS, region_of) == [[]] * RANKS


WEIGHTS = {"modulation": (6, 6), "up": (8, 6), "down": (6, 8), "bias": (6,), "router": (1, 6), "table": (6,)}
CUT_DIM = {"modulation": 0, "up": 0, "down": 1}


def network(x_BTD, cond_BD, shared_BD, weights, region, group):
    """Modulate, a router, two layers, a bias and a sum, as a block does; region None: uncut."""

    def through(name, value):
        return value if region is None else getattr(region, name)(value)

    x_BTD = through("split_tokens", x_BTD)
    cond_BD = cond_BD if region is None else enter(cond_BD, group)
    scale_BD = through("gather_features", F.linear(cond_BD, weights["modulation"]))
    x_BTD = x_BTD * scale_BD[:, None]
    # As a router does: it reads tokens between the layers and the conditioning, and all tokens' scores add up.
    score_BT = F.linear(x_BTD, weights["router"])[..., 0] + through("count_once", cond_BD).sum(1, keepdim=True)
    # As a shared modulation does: it is carried whole, and has not entered.
    x_BTD = x_BTD + (through("enter_between", shared_BD) + weights["table"])[:, None]
    total_B = through("sum_tokens", score_BT.sigmoid().sum(1))
    hidden_BTF = F.gelu(F.linear(through("enter", x_BTD), weights["up"]))
    x_BTD = x_BTD * score_BT[..., None] + through("leave", F.linear(hidden_BTF, weights["down"])) + weights["bias"]
    return through("collect_tokens", x_BTD.tanh()) * total_B[:, None, None]


def problem(region, group, rank):
    """(output, gradients by name) of the network on this rank's part of the weights; whole when region is None."""
    inputs = {
        "x": numbers(1, *SHAPE),
        "cond": numbers(2, SHAPE[0], SHAPE[2]),
        "shared": numbers(20, SHAPE[0], SHAPE[2]),
    }
    weights = {name: numbers(3 + i, *shape) for i, (name, shape) in enumerate(WEIGHTS.items())}
    if region is not None:
        weights |= {name: part(weights[name], rank, dim).clone() for name, dim in CUT_DIM.items()}
    leaves = {name: value.requires_grad_() for name, value in (inputs | weights).items()}
    out = network(*inputs.values(), weights, region, group)
    (out * numbers(9, *SHAPE)).sum().backward()
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def cut_network(rank, world_size, region_of):
    group = Grid(Layout(1, 1, 1, world_size), rank)["tp"]
    out, grads = problem(region_of(group), group, rank)
    if "tp" in region_of.partial:
        grads |= {name: group.all_reduce(grads[name]) for name in ("bias", "router", "table")}
    expected_out, expected = problem(None, None, 0)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        whole = part(expected[name], rank, CUT_DIM[name]) if name in CUT_DIM else expected[name]
        torch.testing.assert_close(grad, whole, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("region_of", REGIONS)
def test_a_cut_network_computes_what_the_uncut_one_does(region_of):
    run_ranks(cut_network, RANKS, region_of)
