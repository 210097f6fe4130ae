"""How ZeRO gathers the gradient of a step: microbatch by microbatch, stage by stage, in fp32, at its owners."""

import gc
import time
from unittest import mock

import pytest
import torch

from megadit.model.weights import decays
from megadit.parallel.grid import Grid, Layout
from megadit.parallel.placement import Cut, Placement, placed, placement_of
from megadit.zero import OptimConfig, create_engine, engine
from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.zero.runs import backward, fresh

EXPERT = Placement(cuts=(Cut(0, ("ep", "tp")),))
# Two pipeline stages of one rank, one without experts; sizes that leave padding in the partitions.
STAGES = [
    {
        "dense": ((5, 7), Placement()),
        "columns": ((4, 9), Placement(cuts=(Cut(0, ("tp",)),))),
        "partial": ((3, 5), Placement(partial=("tp",))),
    },
    {"dense.bias": ((3,), Placement()), "expert": ((2, 5, 3), EXPERT), "expert.bias": ((2, 5), EXPERT)},
]
EVERYTHING = STAGES[0] | STAGES[1]
LAYOUTS = [Layout(1, 1, 1, 1), Layout(1, 3, 1, 1), Layout(1, 2, 2, 1), Layout(1, 2, 1, 2), Layout(1, 1, 2, 2)]
ENGINES = {
    "zero1": (1, torch.float32),
    "zero2": (2, torch.float32),
    "zero1_bf16": (1, torch.bfloat16),
    "zero2_bf16": (2, torch.bfloat16),
}
# AdamW's first moment is then the gradient itself.
GRADIENT_ONLY = OptimConfig(betas=(0.0, 0.9), clip=0.0)


def parameters(dtype, kept=EVERYTHING):
    named = [(name, placed(shape, placement, dtype=dtype)) for name, (shape, placement) in kept.items()]
    with torch.no_grad():
        for _, parameter in named:
            parameter.zero_()
    return named


def gradient_of(name, layout, rank, microbatch, dtype):
    """What this rank contributes. Ranks along tp contribute the same to a parameter that is whole and sees all work."""
    shape, placement = EVERYTHING[name]
    whole = not (placement.cuts or placement.partial)
    source = min(layout.members(("tp",), rank)) if whole else rank
    seed = (list(EVERYTHING).index(name) * 100 + source) * 100 + microbatch
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leave(parameter, gradient):
    """As a backward pass does; a schedule may leave a matrix transposed."""
    if parameter.grad is None:
        parameter.grad = gradient.mT.contiguous().mT if gradient.dim() > 1 else gradient
    else:
        parameter.grad += gradient


def expected_gradient(name, layout, rank, microbatches, dtype):
    """In float64: the sum over microbatches and over the ranks with the same part, divided by the size of dp."""
    _, placement = EVERYTHING[name]
    ranks = layout.members((*placement.data_axes, *placement.partial), rank)
    return sum(gradient_of(name, layout, r, m, dtype).double() for r in ranks for m in microbatches) / layout.dp


def stepped(grid, stage, dtype, count, announced, bucket):
    """Two steps of `count` microbatches each: the norm, and this rank's part of the sum of squares that it stands for.

    `announced`: accumulate() is called after each stage's backward pass. `bucket`: elements reduced at once.
    """
    layout, rank, named = grid.layout, grid.rank, parameters(dtype)
    with mock.patch.object(engine, "MAX_BUCKET", bucket):
        optimizer = create_engine(stage, named, grid, GRADIENT_ONLY, decays)
    for step in (1, 2):
        microbatches = range(step * count, (step + 1) * count)
        for microbatch in microbatches:
            for names in STAGES:
                for name, parameter in named:
                    if name in names:
                        leave(parameter, gradient_of(name, layout, rank, microbatch, dtype))
                if announced:
                    optimizer.accumulate()
        optimizer.reduce_gradients()
        norm = optimizer.step(0.0, torch.zeros(())).norm
        expected = {name: expected_gradient(name, layout, rank, microbatches, dtype) for name, _ in named}
        for fragment in optimizer.fragments():
            if fragment.kind == "exp_avg":
                there = expected[fragment.name].flatten()[fragment.start : fragment.start + fragment.flat.numel()]
                where = f"{fragment.name}, stage {stage}, {dtype}, step {step}"
                torch.testing.assert_close(fragment.flat.double(), there, rtol=1e-6, atol=1e-6, msg=where)
        assert all(parameter.grad is None for _, parameter in named)
    squares = sum(expected[name].square().sum() for name, p in named if placement_of(p).is_owner(grid))
    return float(norm), float(squares)


def stepped_by_every_engine(rank, world_size, layout, *how):
    grid = Grid(layout, rank)
    return {kind: stepped(grid, stage, dtype, *how) for kind, (stage, dtype) in ENGINES.items()}


@pytest.mark.parametrize(
    ("count", "announced", "bucket"),
    [
        (4, True, 1 << 27),
        (2, True, 33),  # buckets that fill up in between, and parameters larger than a bucket
        (1, False, 1 << 27),  # reduce_gradients finds everything in p.grad
    ],
    ids=["microbatches", "small_buckets", "unannounced"],
)
@pytest.mark.parametrize("layout", slow_but(LAYOUTS[1:3], LAYOUTS), ids=str)
def test_every_gradient_is_summed_in_fp32_and_divided_by_the_size_of_dp(layout, count, announced, bucket):
    ranks = run_ranks(stepped_by_every_engine, layout.ranks.numel(), layout, count, announced, bucket)
    for kind in ENGINES:
        norm = sum(rank[kind][1] for rank in ranks) ** 0.5
        assert [rank[kind][0] for rank in ranks] == pytest.approx([norm] * len(ranks), rel=1e-6), kind


def storage_bytes(named):
    """Of all tensors that Python can reach, gradients included; views of one storage count once."""
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    tensors += [parameter.grad for _, parameter in named if parameter.grad is not None]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def settled_bytes(named, expected):
    """`storage_bytes`, once gloo's threads have let go of what they sent: a moment after a collective returns."""
    deadline = time.monotonic() + 5
    while (found := storage_bytes(named)) > expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def kept(rank, world_size, stage, dtype):
    """Bytes that there are more between microbatches than before the first, and the bytes of one fp32 gradient."""
    layout = Layout(1, world_size, 1, 1)
    placements = {f"layer_{i}": ((31, 67), Placement()) for i in range(6)}
    placements |= {f"experts_{i}": ((4, 31, 17), EXPERT) for i in range(6)}
    named = parameters(dtype, placements)
    optimizer = create_engine(stage, named, Grid(layout, rank), OptimConfig(), decays)
    whole = sum(4 * parameter.numel() for _, parameter in named)
    before, most = storage_bytes(named), 0
    allowed = whole if stage == 1 else whole / world_size + 4 * 16  # partitions are filled up to equal sizes
    for _ in range(3):
        for i in range(6):
            for name, parameter in named:
                if name.endswith(f"_{i}"):
                    leave(parameter, torch.ones_like(parameter))
            optimizer.accumulate()
            most = max(most, settled_bytes(named, before + allowed) - before)
            if stage == 2:
                assert all(p.grad is None and p.grad_accum is None for _, p in named)
    optimizer.reduce_gradients()
    optimizer.step(1e-3, torch.zeros(()))
    assert settled_bytes(named, before + 4) <= before + 4  # the norm
    return most, allowed, whole


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_between_microbatches_zero_2_keeps_its_share_of_the_gradient_and_zero_1_the_whole(stage, dtype):
    for most, allowed, whole in run_ranks(kept, 4, stage, dtype):
        assert whole / 4 <= most <= allowed
        assert stage == 2 or most == whole


def without_one(rank, world_size, stage):
    named = parameters(torch.float32)
    optimizer = create_engine(stage, named, Grid(Layout(1, 1, 1, 1), rank), OptimConfig(), decays)
    for step in (1, 2):
        for name, parameter in named:
            if (name, step) != ("partial", 2):
                leave(parameter, torch.ones_like(parameter))
        optimizer.accumulate()
        optimizer.reduce_gradients()
        optimizer.step(1e-3, torch.zeros(()))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_without_a_gradient_is_named(stage):
    with pytest.raises(AssertionError, match="partial has no gradient"):
        run_ranks(without_one, 1, stage)


BF16 = ["run.dtype=bfloat16", "data.global_batch=64", "data.micro_batch=1"]
SCHEDULES = {
    "one": (1, ["zero.stage=1"]),
    "one_zero2": (1, ["zero.stage=2"]),
    "pipeline2": (2, ["zero.stage=1", "parallel.pipeline=2"]),
    "interleaved": (2, ["zero.stage=1", "parallel.pipeline=2", "parallel.schedule=interleaved"]),
    "interleaved_zero2": (2, ["zero.stage=2", "parallel.pipeline=2", "parallel.schedule=interleaved"]),
    "zbv": (2, ["zero.stage=1", "parallel.pipeline=2", "parallel.schedule=zbv"]),
}


def accumulated(rank, world_size, overrides):
    """Gradients as autograd makes them, seen by hooks on the parameters, against what the optimizer then works with."""
    run = fresh(rank, world_size, [*BF16, *overrides])
    made, seen = {}, {name: 0 for name, _ in run.named}
    for name, parameter in run.named:

        def add(gradient, name=name):
            assert gradient.dtype == torch.bfloat16
            made[name] = made[name] + gradient.float() if name in made else gradient.float()
            seen[name] += 1

        parameter.register_hook(add)
    backward(run, 1)
    run.engine.reduce_gradients()
    names = {parameter: name for name, parameter in run.named}
    for parameter, gradient in run.engine.optimizer.partitioned_gradients():
        name = names.pop(parameter)
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, made[name]), name
    assert not names and set(seen.values()) == {64}


@pytest.mark.parametrize("case", slow_but({"interleaved_zero2", "zbv"}, SCHEDULES))
def test_64_microbatches_leave_the_fp32_sum_of_their_bf16_gradients(case):
    world_size, overrides = SCHEDULES[case]
    run_ranks(accumulated, world_size, overrides)


def small_updates(rank, world_size, stage):
    """A constant gradient moves a weight by the learning rate at every step: 1e-4, where bf16 has steps of 2^-8."""
    layout = Layout(1, world_size, 1, 1)
    named = parameters(torch.bfloat16, {"dense": ((4, 4), Placement())})
    (_, parameter), reference = named[0], torch.ones(4, 4, dtype=torch.float64)
    parameter.data.fill_(1.0)
    optimizer = create_engine(stage, named, Grid(layout, rank), OptimConfig(weight_decay=0.0), decays)
    still = 0
    for step in range(1, 101):
        parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.accumulate()
        optimizer.reduce_gradients()
        optimizer.step(1e-4, torch.zeros(()))
        reference -= 1e-4
        masters = [f for f in optimizer.fragments() if f.kind == "master"]
        for master in masters:
            assert master.flat.dtype == torch.float32
            there = reference.flatten()[master.start : master.start + master.flat.numel()]
            torch.testing.assert_close(master.flat.double(), there, rtol=1e-5, atol=0)
            assert torch.equal(parameter.flatten()[master.start :][: master.flat.numel()], master.flat.bfloat16())
        still += bool((parameter == 1).all())
        assert step > 1 or still
    assert 10 < still < 50  # the weight waits for its master to come halfway to the next bf16 number
    assert (parameter < 0.995).all()


@pytest.mark.parametrize("stage", [1, 2])
def test_updates_smaller_than_a_step_of_bf16_are_not_lost(stage):
    run_ranks(small_updates, 2, stage)
