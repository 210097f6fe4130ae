"""The masters are live through a training, and the parameters follow what is written into them."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.zero.runs import advance, copies, fresh

ENGINES = {
    "stage0": ["run.dtype=float64", "zero.stage=0"],
    "zero1": ["run.dtype=float32", "zero.stage=1"],
    "zero2_bf16": ["run.dtype=bfloat16", "zero.stage=2"],
}
LAYOUTS = {"one": (1, []), "tensor2_expert2": (4, ["parallel.tensor=2", "parallel.expert=2"])}


def number(name):
    """Of a parameter: one that bf16 has to round."""
    return 1 + len(name) / 1000


def write_and_undo(rank, world_size, overrides):
    """Fill the masters, put them back, and go on; the norms of the two steps after, and those without all this."""
    run, plain = (fresh(rank, world_size, overrides) for _ in range(2))
    masters = run.engine.masters()
    kind = "weight" if run.config.zero.stage == 0 else "master"
    assert {master.kind for master in masters} == {kind}
    assert not any(master.flat.requires_grad for master in masters)
    advance(run, (1, 2))
    for early, late in zip(masters, run.engine.masters(), strict=True):
        assert (early.name, early.start, early.flat.data_ptr()) == (late.name, late.start, late.flat.data_ptr())
    weights = copies(run)
    for master in masters:
        part = weights[master.name].flatten()[master.start : master.start + master.flat.numel()]
        assert torch.equal(master.flat.to(part.dtype), part), master.name

    kept = [master.flat.clone() for master in masters]
    for master in masters:
        master.flat.fill_(number(master.name))
    run.engine.masters_changed()
    for name, parameter in run.named:
        # All of it: also what other ranks hold the masters of.
        assert (parameter == torch.tensor(number(name), dtype=parameter.dtype)).all(), name
    for master, values in zip(masters, kept, strict=True):
        master.flat.copy_(values)
    run.engine.masters_changed()
    for name, parameter in run.named:
        assert torch.equal(parameter, weights[name]), name
    advance(plain, (1, 2))
    return advance(run, (3, 4)), advance(plain, (3, 4))


@pytest.mark.parametrize("layout", slow_but(["tensor2_expert2"], LAYOUTS))
@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_follow_the_masters_there_and_back(engine, layout):
    world_size, overrides = LAYOUTS[layout]
    for disturbed, plain in run_ranks(write_and_undo, world_size, [*overrides, *ENGINES[engine]]):
        assert disturbed == plain
