"""The gradient of every single parameter equals one process's: an adaptive optimizer would hide a wrong scale."""

import pytest
import torch

from megadit.parallel.init import Normal, initialise
from megadit.parallel.placement import placement_of
from megadit.runtime.launch import Process
from megadit.training.build import build_run, read_inputs
from megadit.training.config import check, load_config
from megadit.training.step import prepare
from tests.parity.layouts import CONFIG, LAYOUTS
from tests.ranks import run_ranks

EXTRA = {
    "tensor4": (4, ["parallel.tensor=4"]),
    "expert4": (4, ["parallel.expert=4"]),
    "pipeline4": (4, ["parallel.pipeline=4"]),
}
VARIANTS = {"": [], "ungated_bias": ["model.modulation=scale_shift", "model.bias=true"], "dense": ["model.experts=0"]}


def owned_gradients(rank, world_size, overrides):
    """{name: (whole shape, offsets, this rank's part)} after one backward pass, of the parameters this rank owns.

    No parameter starts at zero or one, so that every path carries a gradient.
    """
    config = load_config(CONFIG, overrides)
    process = Process(rank, world_size, rank, torch.device("cpu"))
    run = build_run(config, check(config, world_size), read_inputs(config), process)
    initialise(run.named, run.grid, 1, lambda name: Normal(0.2))
    noisy, target, keywords = prepare(run, run.loader.batch(1), 1, caption_dropout=0.3)
    run.pipeline.train(noisy, target, keywords)
    run.engine.reduce_gradients()
    found = {}
    for name, parameter in run.named:
        placement = placement_of(parameter)
        if placement.is_owner(run.grid):
            shape = placement.logical_shape(parameter.shape, run.grid)
            found[name] = (shape, placement.offsets(parameter.shape, run.grid), parameter.grad.numpy())
    return found


def whole_gradients(world_size, overrides):
    """{name: whole gradient}, put together from the ranks' parts; elements that nobody owns would stay NaN."""
    whole = {}
    for found in run_ranks(owned_gradients, world_size, overrides):
        for name, (shape, offsets, part) in found.items():
            gradient = whole.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape, strict=True))
            gradient[place] = torch.from_numpy(part)
    return whole


@pytest.fixture(scope="module")
def oracles():
    return {variant: whole_gradients(1, overrides) for variant, overrides in VARIANTS.items()}


CASES = [
    *[(layout, "") for layout in (LAYOUTS | EXTRA)],
    *[(layout, "ungated_bias") for layout in ("tensor2_expert2", "tensor2_expert2_sequence", "pipeline2_expert2")],
    *[(layout, "dense") for layout in ("tensor2", "tensor2_pipeline2_sequence", "data2")],
]


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_every_gradient_agrees_with_one_process(layout, variant, oracles):
    world_size, overrides = (LAYOUTS | EXTRA)[layout]
    gradients = whole_gradients(world_size, [*overrides, *VARIANTS[variant]])
    oracle = oracles[variant]
    assert gradients.keys() == oracle.keys()
    for name, expected in oracle.items():
        norm = expected.norm()
        assert norm > 0, f"{name} has no gradient: the test would not see it"
        error = (gradients[name] - expected).norm() / norm
        assert error < 1e-9, f"{name}: relative error {error:.1e}"
