"""The linear layers: cut by columns then rows they equal two whole layers, output and every gradient."""

import pytest
import torch
from torch import nn

from megadit.parallel.grid import Grid, Group, Layout
from megadit.parallel.init import Normal, initialise
from megadit.parallel.placement import Cut, placement_of
from megadit.parallel.tensor.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, divide
from megadit.parallel.tensor.mappings import CutTokens, ReplicatedTokens
from tests.parallel.places import Place, layouts_of
from tests.ranks import run_ranks

REGIONS = [ReplicatedTokens, CutTokens]
NAMES = {"up": (8, 6), "down": (6, 8), "last": (5, 6)}


class Layers(nn.Module):
    """Column-parallel, row-parallel and replicated, as a feed-forward layer and the head are."""

    def __init__(self, region, bias):
        super().__init__()
        self.region = region
        self.up = ColumnParallelLinear(6, 8, region.group, bias)
        self.down = RowParallelLinear(8, 6, region, bias)
        self.last = ReplicatedLinear(6, 5, bias, partial=region.partial)

    def forward(self, x_BTD):
        x_BTD = self.region.split_tokens(x_BTD)
        return self.region.collect_tokens(self.last(self.down(self.up(self.region.enter(x_BTD)).tanh())))


def start(layers, grid):
    layers.double()
    initialise(layers.named_parameters(), grid, 0, lambda name: Normal(1.0))
    return layers


def whole_layers(bias):
    """torch's own layers with the same weights as the cut ones."""
    alone = Place(*layouts_of(1), 0)
    ours = start(Layers(ReplicatedTokens(alone["tp"]), bias), alone)
    whole = nn.ModuleDict({name: nn.Linear(*shape[::-1], bias=bias) for name, shape in NAMES.items()}).double()
    whole.load_state_dict(ours.state_dict())
    return whole


def agree(rank, world_size, region_of, bias):
    grid = Grid(Layout(1, 1, 1, world_size), rank)
    layers, whole = start(Layers(region_of(grid["tp"]), bias), grid), whole_layers(bias)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, 4, n, generator=generator, dtype=torch.float64) for n in (6, 5))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layers(mine), whole["last"](whole["down"](whole["up"](theirs).tanh()))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    parameters = dict(whole.named_parameters())
    assert parameters.keys() == dict(layers.named_parameters()).keys()
    for name, parameter in layers.named_parameters():
        grad, placement = parameter.grad, placement_of(parameter)
        if placement.partial:
            grad = grid["tp"].all_reduce(grad)
        part = parameters[name].grad
        for dim, (begin, length) in enumerate(
            zip(placement.offsets(grad.shape, grid), grad.shape, strict=True),
        ):
            part = part.narrow(dim, begin, length)
        torch.testing.assert_close(grad, part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("region_of", REGIONS)
def test_cut_layers_compute_what_whole_layers_do(region_of, bias):
    run_ranks(agree, 2, region_of, bias)


def share(rank, world_size, region_of):
    """Shares that leave together are what leaves of each alone: one sum over the ranks, not two."""
    grid = Grid(Layout(1, 1, 1, world_size), rank)
    region = region_of(grid["tp"])
    layers = [start(RowParallelLinear(8, 6, region, bias), grid) for bias in (False, True)]
    x_BTF = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    whole = grid["tp"].all_gather(x_BTF, 2)
    alone = Place(*layouts_of(1), 0)
    weights = [start(RowParallelLinear(8, 6, ReplicatedTokens(alone["tp"]), False), alone).weight] * 2
    shares = [layer.share(x_BTF) for layer in layers]
    assert shares[0].shape == (2, 4, 6)
    expected = region.split_tokens(sum(whole @ weight.T for weight in weights))
    torch.testing.assert_close(region.leave(sum(shares)), expected, rtol=1e-12, atol=1e-12)
    for layer, mine in zip(layers, shares, strict=True):
        left = region.leave(mine) + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x_BTF), left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("region_of", REGIONS)
def test_a_share_is_what_leaves_before_the_bias(region_of):
    run_ranks(share, 2, region_of)


@pytest.mark.parametrize(("region_of", "partial"), [(ReplicatedTokens, ()), (CutTokens, ("tp",))])
def test_the_tags_say_what_is_cut_and_which_gradients_are_parts(region_of, partial):
    layers = Layers(region_of(Group(None, 2, 0)), bias=True)
    found = {name: (p.shape, placement_of(p).cuts, placement_of(p).partial) for name, p in layers.named_parameters()}
    assert found == {
        "up.weight": ((4, 6), (Cut(0, ("tp",)),), ()),
        "up.bias": ((4,), (Cut(0, ("tp",)),), ()),
        "down.weight": ((6, 4), (Cut(1, ("tp",)),), ()),
        "down.bias": ((6,), (), partial),
        "last.weight": ((5, 6), (), partial),
        "last.bias": ((5,), (), partial),
    }


def test_a_width_that_does_not_divide_is_an_error():
    assert divide(12, 4) == 3
    with pytest.raises(AssertionError, match="10 is not a multiple of 4"):
        divide(10, 4)
