"""The state as logical tensors: the ranks' pieces tile every one of them, once, under names without a layout."""

from functools import cache

import pytest
import torch

from megadit.training.state import logical_state
from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.training.assembled import assembled, make_step

STAGES = {
    0: ["run.dtype=float64", "zero.stage=0"],
    1: ["run.dtype=float32", "zero.stage=1"],
    2: ["run.dtype=float32", "zero.stage=2"],
    "1 bf16": ["run.dtype=bfloat16", "zero.stage=1"],
    "2 bf16": ["run.dtype=bfloat16", "zero.stage=2"],
}
LAYOUTS = {
    "one": (1, []),
    "tensor2_expert2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "pipeline2_data2": (4, ["parallel.pipeline=2"]),
}
KINDS = {"weight", "ema", "exp_avg", "exp_avg_sq"}


def as_numpy(tensor):
    """numpy has no bf16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def pieces(rank, world_size, overrides):
    """What this rank owns and what it holds, as {name: (whole shape, dtype, [(offsets, values)])}, after one step."""
    run = assembled(rank, world_size, *overrides)
    make_step(run, 1)
    owned, held = (
        {
            name: (
                logical.shape,
                str(logical.dtype),
                [(piece.offsets, as_numpy(piece.tensor)) for piece in logical.pieces],
            )
            for name, logical in logical_state(run.named, run.ema, run.engine, run.grid, owned_only).items()
        }
        for owned_only in (True, False)
    )
    return owned, held


@cache
def pieces_of(stage, layout):
    """(each rank's owned pieces, each rank's held pieces)."""
    world_size, overrides = LAYOUTS[layout]
    return tuple(zip(*run_ranks(pieces, world_size, [*STAGES[stage], *overrides]), strict=True))


def assembled_tensors(ranks):
    """({name: whole tensor}, {name: how many pieces cover each element}) from all ranks' pieces."""
    whole, covered = {}, {}
    for name, (shape, _, parts) in ((name, value) for rank in ranks for name, value in rank.items()):
        tensor = whole.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
        count = covered.setdefault(name, torch.zeros(shape, dtype=torch.int64))
        for offsets, values in parts:
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, values.shape, strict=True))
            tensor[place] = torch.from_numpy(values).double()
            count[place] += 1
    return whole, covered


CASES = [
    *[(stage, layout) for stage in (0, 1) for layout in LAYOUTS],
    *[(2, "tensor2_expert2"), (2, "pipeline2_data2"), ("1 bf16", "tensor2_expert2"), ("2 bf16", "tensor2_expert2")],
]
QUICK = [(0, "one"), (1, "tensor2_expert2"), ("2 bf16", "tensor2_expert2")]


@pytest.mark.parametrize(("stage", "layout"), slow_but(QUICK, CASES, unpack=True))
def test_owned_pieces_tile_every_logical_tensor_once(stage, layout):
    owned, _ = pieces_of(stage, layout)
    _, covered = assembled_tensors(owned)
    assert {name.partition(".")[0] for name in covered} == KINDS | ({"master"} if stage else set())
    for name, count in covered.items():
        assert (count == 1).all(), f"{name}: {int(count.min())} to {int(count.max())} owners"


@pytest.mark.parametrize(("stage", "layout"), slow_but(QUICK, CASES, unpack=True))
def test_names_shapes_and_values_are_those_of_one_process(stage, layout):
    owned, _ = pieces_of(stage, layout)
    (expected,), _ = pieces_of(stage, "one")
    described = [{(name, *logical[:2]) for name, logical in rank.items()} for rank in owned]
    assert set.union(*described) == {(name, *logical[:2]) for name, logical in expected.items()}
    whole, _ = assembled_tensors(owned)
    tolerance = {0: 1e-11, 1: 1e-5, 2: 1e-5}.get(stage, 0.1)  # in bf16 a step depends on the order of every sum
    for name, tensor in assembled_tensors([expected])[0].items():
        error = (whole[name] - tensor).norm() / tensor.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("stage", "layout"), slow_but(QUICK, CASES, unpack=True))
def test_a_rank_that_loads_asks_for_all_that_it_holds(stage, layout):
    owned, held = pieces_of(stage, layout)
    world_size = LAYOUTS[layout][0]
    stages = 2 if layout.startswith("pipeline2") else 1
    _, covered = assembled_tensors(held)
    for name, count in covered.items():
        assert count.min() >= 1, name
    # Of a tensor that nothing cuts, every rank of its stage has the weight, and brings it once.
    assert (covered["weight.blocks.0.attention.q_norm.weight"] == world_size // stages).all()
    for mine, all_mine in zip(owned, held, strict=True):
        assert mine.keys() <= all_mine.keys()


def are_live(rank, world_size, overrides):
    """Whether writing into the pieces writes into the model."""
    run = assembled(rank, world_size, *overrides)
    state = logical_state(run.named, run.ema, run.engine, run.grid, owned_only=False)
    for name, tensor in state.items():
        for piece in tensor.pieces:
            piece.tensor.fill_(len(name))
    weights = all((parameter == len(f"weight.{name}")).all() for name, parameter in run.named)
    averages = all((f.flat == len(f"ema.{f.name}")).all() for f in run.ema.averages)
    moments = all((f.flat == len(f"{f.kind}.{f.name}")).all() for f in run.engine.fragments())
    return bool(weights), bool(averages), bool(moments)


@pytest.mark.parametrize("stage", STAGES)
def test_pieces_are_live_views(stage):
    overrides = [*STAGES[stage], "parallel.tensor=2"]
    assert run_ranks(are_live, 2, overrides) == [(True, True, True)] * 2
