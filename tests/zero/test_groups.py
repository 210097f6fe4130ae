"""What both engines share: parameter groups, reductions and the norm."""

import pytest
import torch

from megadit.model.ecdit import ECDiT
from megadit.model.weights import decays
from megadit.parallel.grid import Grid, Layout
from megadit.parallel.placement import Cut, Placement, placed
from megadit.parallel.tensor.mappings import ReplicatedTokens
from megadit.training.config import load_config
from megadit.zero.config import OptimConfig
from megadit.zero.groups import global_norm, group_parameters, read_update
from megadit.zero.reference import ReferenceEngine
from tests.parallel.places import Place, layouts_of
from tests.ranks import run_ranks

DENSE, EXPERT = Placement(), Placement(cuts=(Cut(0, ("ep", "tp")),))
SOUND = torch.ones((), dtype=torch.bool)
PLACEMENTS = {
    "dense": DENSE,
    "dense.bias": DENSE,
    "columns": Placement(cuts=(Cut(0, ("tp",)),)),
    "partial": Placement(partial=("tp",)),
    "expert": EXPERT,
    "expert.bias": EXPERT,
}


def contents(groups):
    return {(g.is_expert, g.data_axes, g.weight_decay): [name for name, _ in g.named] for g in groups}


def test_dense_and_expert_parameters_with_and_without_decay():
    named = [(name, placed((2, 2), placement)) for name, placement in PLACEMENTS.items()]
    groups = group_parameters(named, 0.1, decays)
    assert contents(groups) == {
        (False, ("edp", "ep"), 0.1): ["dense", "columns", "partial"],
        (False, ("edp", "ep"), 0.0): ["dense.bias"],
        (True, ("edp",), 0.1): ["expert"],
        (True, ("edp",), 0.0): ["expert.bias"],
    }
    assert len(groups) == 4
    for group in groups:
        assert [id(parameter) for parameter in group.parameters] == [id(dict(named)[name]) for name, _ in group.named]


@pytest.mark.parametrize("kept", [["dense"], ["dense.bias", "expert"], []])
def test_empty_groups_are_left_out(kept):
    named = [(name, placed((2, 2), PLACEMENTS[name])) for name in kept]
    groups = group_parameters(named, 0.1, decays)
    assert sorted(name for group in groups for name, _ in group.named) == sorted(kept)
    assert len(groups) == len(kept)


@pytest.mark.parametrize("overrides", [[], ["model.bias=true", "model.modulation=scale_shift", "text.layers=2"]])
def test_norms_biases_and_embeddings_of_the_model_do_not_decay(overrides):
    config = load_config("tests/configs/tiny.yaml", overrides)
    grid = Place(*layouts_of(1), 0)
    layers = range(config.model.layers)
    model = ECDiT(config.model, config.text, layers, ReplicatedTokens(grid["tp"]), grid["ep"])
    # Norms and biases are the vectors; embeddings are what is looked up by token and by position.
    spared = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert any("norm" in name for name in spared) and any(name.endswith(".bias") for name in spared)
    spared |= {"embed.text.tokens", "embed.text.positions"}
    named = list(model.named_parameters())
    groups = {(g.is_expert, g.weight_decay): {n for n, _ in g.named} for g in group_parameters(named, 0.1, decays)}
    experts = {name for name, _ in named if ".experts." in name}
    biases = {name for name in experts if name.endswith("_bias")}  # matrices: a row for each expert
    assert (len(experts - biases), len(biases)) == (4, 4 if config.model.bias else 0)
    everything = {name for name, _ in named}
    expected = {(False, 0.0): spared, (False, 0.1): everything - spared - experts, (True, 0.1): experts - biases}
    assert groups == (expected | {(True, 0.0): biases} if biases else expected)


def gradient_of(name, shape, rank, ranks_of):
    """A whole gradient, the same on the ranks that `ranks_of` maps to one number."""
    seed = list(PLACEMENTS).index(name) * 100 + ranks_of(rank)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reduced_gradients(grid):
    """(this rank's part of each gradient by name, the norm of all): replicas hold equal ones."""
    parts, squares = {}, torch.zeros((), dtype=torch.float64)
    for name, placement in PLACEMENTS.items():
        whole = gradient_of(name, (8, 3), 0, int)
        squares += whole.square().sum()
        local = (8 // grid.size(placement.cuts[0].axes), 3) if placement.cuts else (8, 3)
        begin = placement.offsets(local, grid)[0]
        parts[name] = whole[begin : begin + local[0]]
    return parts, squares.sqrt()


def norm_on(rank, world_size, layout):
    grid = Grid(layout, rank)
    parts, expected = reduced_gradients(grid)
    owned = [parts[name] for name, placement in PLACEMENTS.items() if placement.is_owner(grid)]
    norm, sums = global_norm(
        owned, grid, torch.zeros((), dtype=torch.float64), SOUND, torch.tensor(rank + 0.5), told=0.25
    )
    assert sums[1:].tolist() == [8.0, 1.0], "each rank's loss, and what it tells"
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("layout", [Layout(1, 1, 2, 2), Layout(1, 2, 2, 1), Layout(1, 2, 1, 2)], ids=str)
def test_the_norm_counts_every_element_once(layout):
    run_ranks(norm_on, 4, layout)


def clipped(rank, world_size, layout):
    """First moments after a step show by which norm this rank's gradients were clipped."""
    grid = Grid(layout, rank)
    parts, norm = reduced_gradients(grid)
    named = [(name, placed(part.shape, PLACEMENTS[name], dtype=part.dtype)) for name, part in parts.items()]
    for name, parameter in named:
        parameter.grad = parts[name].clone()
    engine = ReferenceEngine(named, grid, OptimConfig(clip=0.5, betas=(0.9, 0.95)), decays)
    update = engine.step(1e-3, torch.zeros(()))
    torch.testing.assert_close(update.norm, norm, rtol=1e-14, atol=0)
    moments = {fragment.name: fragment.flat for fragment in engine.fragments() if fragment.kind == "exp_avg"}
    for name, part in parts.items():
        torch.testing.assert_close(moments[name], 0.1 * 0.5 / (norm + 1e-6) * part.reshape(-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", [Layout(1, 1, 2, 2), Layout(1, 2, 1, 2)], ids=str)
def test_gradients_are_clipped_by_the_norm_of_all(layout):
    run_ranks(clipped, 4, layout)


def a_stage_without_owned_parameters(rank, world_size):
    grid = Grid(Layout(2, 1, 1, 1), rank)
    owned = [torch.full((3, 3), 2.0)] if rank == 0 else []
    norm, _ = global_norm(owned, grid, torch.zeros(()), SOUND, torch.zeros(()), told=0.0)
    assert float(norm) == 6.0


def test_a_rank_that_owns_nothing_takes_part_in_the_norm():
    run_ranks(a_stage_without_owned_parameters, 2)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_is_applied_where_norm_and_loss_are_finite(bad):
    def is_applied(squares, loss):
        sums = torch.tensor([squares, loss, 2.0], dtype=torch.float64)
        update = read_update(sums[0].sqrt(), sums)
        assert update.told == 2
        return update.applied

    assert is_applied(4.0, 0.5)
    assert not is_applied(bad, 0.5)
    assert not is_applied(4.0, bad)


def reduced(rank, world_size, layout):
    """`reduce_gradients` against sums over the ranks of plain tensors, every rank's own gradient known to all."""
    grid = Grid(layout, rank)
    named = [(name, placed((2, 3), placement, dtype=torch.float64)) for name, placement in PLACEMENTS.items()]
    for name, parameter in named:
        parameter.grad = gradient_of(name, (2, 3), rank, int)
    ReferenceEngine(named, grid, OptimConfig(), decays).reduce_gradients()
    for name, parameter in named:
        axes = {"partial": ("edp", "ep", "tp"), "expert": ("edp",), "expert.bias": ("edp",)}.get(name, ("edp", "ep"))
        total = sum(gradient_of(name, (2, 3), member, int) for member in layout.members(axes, rank))
        torch.testing.assert_close(parameter.grad, total / layout.dp, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("layout", [Layout(1, 1, 2, 2), Layout(1, 2, 2, 1), Layout(1, 2, 1, 2)], ids=str)
def test_gradients_are_summed_over_their_replicas_and_divided_by_the_size_of_dp(layout):
    run_ranks(reduced, 4, layout)
