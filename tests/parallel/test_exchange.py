"""Tokens to their experts' ranks and back, as many for each expert and as many as there are."""

import pytest
import torch

from megadit.parallel.expert.exchange import combine, combine_ragged, dispatch, dispatch_ragged
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


CASES = ("even", "uneven", "with zeros", "one rank gets all", "one rank sends nothing", "nothing")


def counts_between(ranks, experts, case):
    """[source][destination][expert]: how many rows one rank sends to one expert of another."""
    shape = (ranks, ranks, experts)
    if case == "even":
        return torch.full(shape, 2).tolist()
    counts = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(ranks)) + 1
    if case == "with zeros":
        counts *= torch.arange(counts.numel()).view(shape) % 2
    elif case == "one rank gets all":
        counts[:, :-1] = 0
    elif case == "one rank sends nothing":
        counts[0] = 0
    elif case == "nothing":
        counts.zero_()
    return counts.tolist()


def ragged_labels(source, sent_PL):
    """x_ND, sorted by destination and expert, whose rows say (source, destination, expert, number)."""
    rows = [
        [source, destination, expert, number]
        for destination, counts in enumerate(sent_PL)
        for expert, count in enumerate(counts)
        for number in range(count)
    ]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def exchange_ragged(rank, world_size, experts):
    group = Grid(Layout(1, 1, world_size, 1), rank)["ep"]
    for case in CASES:
        counts = counts_between(world_size, experts, case)
        sent_PL, received_PL = counts[rank], [row[rank] for row in counts]
        x_ND = ragged_labels(rank, sent_PL).requires_grad_()
        y_MD = dispatch_ragged(x_ND, sent_PL, received_PL, group)
        arrived = [
            [source, rank, expert, number]
            for expert in range(experts)
            for source in range(world_size)
            for number in range(counts[source][rank][expert])
        ]
        assert y_MD.tolist() == arrived and y_MD.shape == (len(arrived), 4), case
        assert torch.equal(combine_ragged(y_MD, sent_PL, received_PL, group), x_ND), case
        assert torch.equal(x_ND, ragged_labels(rank, sent_PL)), case

        strided_ND = x_ND.detach().t().contiguous().t()
        assert torch.equal(dispatch_ragged(strided_ND, sent_PL, received_PL, group), y_MD), case

        # The adjoint: <dispatch x, v> = <x, grad> over all ranks; whole numbers, so the sums are exact.
        v_MD = torch.randint(1, 9, y_MD.shape, generator=torch.Generator().manual_seed(rank)).double()
        (grad_ND,) = torch.autograd.grad(y_MD, x_ND, v_MD)
        inner = torch.stack([(y_MD.detach() * v_MD).sum(), (x_ND.detach() * grad_ND).sum()])
        forward, backward = group.all_reduce(inner).tolist()
        assert forward == backward and (forward > 0 or case != "uneven"), case
        assert torch.equal(grad_ND, combine_ragged(v_MD, sent_PL, received_PL, group)), case

        v_MD.requires_grad_()
        (grad_MD,) = torch.autograd.grad(combine_ragged(v_MD, sent_PL, received_PL, group), v_MD, 2 * x_ND.detach())
        assert torch.equal(grad_MD, 2 * y_MD.detach()), case


@pytest.mark.parametrize(("world_size", "experts"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 2)])
def test_as_many_rows_as_there_are_go_and_come_back_and_so_do_their_gradients(world_size, experts):
    run_ranks(exchange_ragged, world_size, experts)


def exchange_both_ways(rank, world_size):
    group = Grid(Layout(1, 1, world_size, 1), rank)["ep"]
    x_PLND, counts_PL = labels(rank, world_size), [[PICKS] * EXPERTS] * world_size
    ragged = dispatch_ragged(x_PLND.flatten(0, 2), counts_PL, counts_PL, group)
    assert torch.equal(ragged, dispatch(x_PLND, group).flatten(0, 1))


def test_equal_counts_are_the_equal_split_exchange():
    run_ranks(exchange_both_ways, 2)
