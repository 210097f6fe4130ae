"""Tokens to their experts' ranks and back."""

import pytest
import torch

from megadit.parallel.expert.exchange import combine, dispatch
from megadit.parallel.grid import Grid, Layout
from tests.ranks import run_ranks

EXPERTS, PICKS = 3, 2  # of one rank, and of one source rank for one expert


def labels(source, ranks):
    """x_PLND whose rows say (source, destination, expert, pick)."""
    destination, expert, pick = torch.meshgrid(
        torch.arange(ranks), torch.arange(EXPERTS), torch.arange(PICKS), indexing="ij"
    )
    return torch.stack([torch.full_like(pick, source), destination, expert, pick], dim=3).double()


def exchange(rank, world_size):
    group = Grid(Layout(1, 1, world_size, 1), rank)["ep"]
    x_PLND = labels(rank, world_size).requires_grad_()
    y_LMD = dispatch(x_PLND, group)
    assert y_LMD.shape == (EXPERTS, world_size * PICKS, 4)
    for expert in range(EXPERTS):
        arrived = [[source, rank, expert, pick] for source in range(world_size) for pick in range(PICKS)]
        assert y_LMD[expert].tolist() == arrived
    assert torch.equal(combine(y_LMD, group), x_PLND)
    assert torch.equal(x_PLND, labels(rank, world_size))

    strided_PLND = x_PLND.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided_PLND.is_contiguous()
    assert torch.equal(dispatch(strided_PLND, group), y_LMD)

    # The adjoint: <dispatch x, v> = <x, grad> over all ranks; whole numbers, so the sums are exact.
    v_LMD = torch.randint(-9, 9, y_LMD.shape, generator=torch.Generator().manual_seed(rank)).double()
    (grad_PLND,) = torch.autograd.grad(y_LMD, x_PLND, v_LMD)
    inner = torch.stack([(y_LMD.detach() * v_LMD).sum(), (x_PLND.detach() * grad_PLND).sum()])
    forward, backward = group.all_reduce(inner).tolist()
    assert forward == backward != 0
    assert torch.equal(grad_PLND, combine(v_LMD, group))

    v_LMD.requires_grad_()
    (grad_LMD,) = torch.autograd.grad(combine(v_LMD, group), v_LMD, grad_PLND + x_PLND.detach())
    assert torch.equal(grad_LMD, dispatch(grad_PLND + x_PLND.detach(), group))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_token_reaches_its_expert_and_comes_back_and_so_does_its_gradient(world_size):
    run_ranks(exchange, world_size)
