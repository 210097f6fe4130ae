"""The average follows its formula, whoever holds which part of it, and swapping it in leaves no trace."""

import pytest
import torch

from megadit.parallel.placement import Placement, placed
from megadit.training.ema import Ema, EmaConfig
from megadit.training.state import logical_state
from megadit.zero import OptimConfig
from megadit.zero.reference import ReferenceEngine
from tests.parity.training import assemble, owned
from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.training.assembled import assembled, make_step

SHAPES = {"matrix": (3, 4), "vector": (5,), "single": (1,)}


def averaged(decay=0.999, dtype=torch.float64):
    """Named parameters, and their average as one process without ZeRO keeps it."""
    generator = torch.Generator().manual_seed(0)
    named = [(name, placed(shape, Placement(), dtype=dtype)) for name, shape in SHAPES.items()]
    with torch.no_grad():
        for _, parameter in named:
            parameter.normal_(generator=generator)
    engine = ReferenceEngine(named, None, OptimConfig(), decays=lambda name: True)
    return named, Ema(engine, EmaConfig(decay))


@torch.no_grad()
def change(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


def copies(named):
    return {name: tensor.detach().clone() for name, tensor in named}


def values(ema):
    return {f.name: f.flat.clone() for f in ema.averages}


@pytest.mark.parametrize("limit", [0.15, 0.999])  # the first is reached at the second step, the other never
def test_five_updates_follow_the_formula(limit):
    named, ema = averaged(limit)
    expected = {name: tensor.flatten() for name, tensor in copies(named).items()}
    for step in range(1, 6):
        change(named, step)
        ema.update(step)
        decay = min(limit, step / (step + 9))
        for name, parameter in named:
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().flatten()
        for name, found in values(ema).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-14, atol=1e-15)


def test_it_starts_at_the_weights_and_shares_no_memory_with_them():
    named, ema = averaged()
    start = copies(named)
    change(named, 1)
    assert [f.name for f in ema.averages] == list(SHAPES)
    for fragment in ema.averages:
        assert torch.equal(fragment.flat, start[fragment.name].flatten())
        assert not fragment.flat.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swapping_in_shows_the_averages_and_restores_the_weights_bitwise(dtype):
    named, ema = averaged(dtype=dtype)
    change(named, 1)
    ema.update(1)
    weights, averages = copies(named), values(ema)
    pointers = [parameter.data_ptr() for _, parameter in named]
    with ema.swapped_in():
        for name, parameter in named:
            assert torch.equal(parameter.flatten(), averages[name])
            assert not torch.equal(parameter, weights[name])
    for name, parameter in named:
        assert torch.equal(parameter, weights[name])
    assert all(torch.equal(found, averages[name]) for name, found in values(ema).items())
    assert [parameter.data_ptr() for _, parameter in named] == pointers, "an optimizer holds views of them"
    assert all(parameter.requires_grad for _, parameter in named)


ENGINES = {
    "stage0": ["run.dtype=float32", "zero.stage=0"],
    "zero1": ["run.dtype=float32", "zero.stage=1"],
    "zero2": ["run.dtype=float32", "zero.stage=2"],
    "zero1_bf16": ["run.dtype=bfloat16", "zero.stage=1"],
    "zero2_bf16": ["run.dtype=bfloat16", "zero.stage=2"],
}
LAYOUTS = {
    "one": (1, []),
    "data2": (2, []),
    "expert2": (2, ["parallel.expert=2"]),
    "tensor2_data2": (4, ["parallel.tensor=2"]),
}


def weights_held(run):
    """{name: [(box of the whole tensor, this rank's elements)]} of the parameters, in float32."""
    state = logical_state(run.named, run.ema, run.engine, run.grid, owned_only=False)
    return {
        name.removeprefix("weight."): [
            (
                tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.tensor.shape, strict=True)),
                piece.tensor.float().numpy().copy(),
            )
            for piece in tensor.pieces
        ]
        for name, tensor in state.items()
        if name.startswith("weight.")
    }


def train(rank, world_size, overrides, swaps):
    """Two steps, the averages in and out again if `swaps`, and a third step; what this rank has at each point.

    eps: a gradient that is nothing but rounding must not become a whole step of AdamW's.
    """
    run = assembled(rank, world_size, "optim.lr=0.02", "optim.eps=1e-5", *overrides)
    for step in (1, 2):
        make_step(run, step)
    averages, inside = owned(run, "ema"), None
    if swaps:
        with run.ema.swapped_in():
            inside = weights_held(run)
    outside = weights_held(run)
    loss = float(make_step(run, 3).values[1])
    held = sum(f.flat.numel() for f in run.ema.averages), sum(f.flat.numel() for f in run.engine.masters())
    after = {kind: owned(run, kind) for kind in ("ema", "exp_avg")}
    return averages, inside, outside, loss, after, weights_held(run), held


def assert_bitwise(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_same_boxes(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, boxes in theirs.items():
            for (box, elements), (other_box, others) in zip(mine[name], boxes, strict=True):
                assert box == other_box and elements.tobytes() == others.tobytes(), name


CASES = [
    *[("tensor2_data2", engine) for engine in ENGINES],
    *[("one", "zero1"), ("data2", "zero2"), ("expert2", "zero1"), ("expert2", "zero2_bf16")],
]


@pytest.mark.parametrize(("layout", "engine"), slow_but(CASES[1:3] + CASES[-1:], CASES, unpack=True))
def test_with_every_engine_the_averages_go_in_and_leave_no_trace(layout, engine):
    world_size, overrides = LAYOUTS[layout]
    overrides = [*ENGINES[engine], *overrides]
    averages, inside, outside, losses, after, last, held = zip(
        *run_ranks(train, world_size, overrides, True), strict=True
    )
    plain = list(zip(*run_ranks(train, world_size, overrides, False), strict=True))
    whole = assemble(averages)
    dtype = torch.bfloat16 if engine.endswith("bf16") else torch.float32
    changed = 0
    for rank_inside, rank_outside in zip(inside, outside, strict=True):
        assert rank_inside.keys() <= whole.keys()
        for name, boxes in rank_inside.items():
            for (box, elements), (_, trained) in zip(boxes, rank_outside[name], strict=True):
                expected = whole[name][box].float().to(dtype).float().numpy()
                assert elements.tobytes() == expected.tobytes(), name
                changed += int((elements != trained).sum())
    assert changed > 0, "averages and weights are alike: the test would not see a swap"
    assert_same_boxes(outside, plain[2])
    assert losses == plain[3]
    for kind in ("ema", "exp_avg"):
        assert_bitwise(assemble([rank[kind] for rank in after]), assemble([rank[kind] for rank in plain[4]]))
    assert_same_boxes(last, plain[5])
    assert all(of_averages == of_masters for of_averages, of_masters in held)


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_each_rank_averages_its_own_part_only(stage):
    """Two data-parallel ranks: half each, where one process without ZeRO has all."""
    ((*_, (everything, _)),) = run_ranks(train, 1, ENGINES["stage0"], False)
    shares = [held[0] for *_, held in run_ranks(train, 2, ENGINES[stage], False)]
    assert sum(shares) == everything
    assert max(shares) < 0.51 * everything


def test_sharded_averages_are_those_of_one_process():
    expected = assemble([run_ranks(train, 1, ENGINES["stage0"], False)[0][4]["ema"]])
    found = assemble([rank[4]["ema"] for rank in run_ranks(train, 4, [*ENGINES["zero1"], "parallel.tensor=2"], False)])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def near(one, other):
    """Which elements differ by roundings of float32 alone: a rounding to bfloat16 is 65,536 times as large."""
    return torch.isclose(one, other, rtol=2**-21, atol=2**-30)


def third_update(rank, world_size, overrides):
    """How many averages the third step leaves as the masters make them, and how many the rounded weights would not."""
    run = assembled(rank, world_size, "optim.lr=0.02", *overrides)
    for step in (1, 2):
        make_step(run, step)
    before = [f.flat.clone() for f in run.ema.averages]
    make_step(run, 3)
    right = other = 0
    for kept, average, master in zip(before, run.ema.averages, run.ema.masters, strict=True):
        right += int(near(average.flat, kept.lerp(master.flat, 9 / 12)).sum())
        other += int((~near(average.flat, kept.lerp(master.flat.bfloat16().float(), 9 / 12))).sum())
    return right, other, sum(flat.numel() for flat in before)


def test_under_bfloat16_the_masters_are_averaged_not_the_rounded_weights():
    for right, other, count in run_ranks(third_update, 2, ENGINES["zero1_bf16"]):
        assert right == count
        assert other > count / 2
