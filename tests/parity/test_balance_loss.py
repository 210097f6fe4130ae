"""The gradient of the load-balancing loss is one process's along every axis and along every two."""

from functools import cache

import pytest

from tests.parity.training import result_of
from tests.tiers import slow_but

WAYS = {
    "capacity": ["model.capacity_factor=1", "model.normalise_gates=true"],
    "dropless": ["model.dropless=true", "model.balance_counts=first"],
}
DEGREES = {"dp2": [], "ep2": ["parallel.expert=2"], "pp2": ["parallel.pipeline=2"], "tp2": ["parallel.tensor=2"]}
LAYOUTS = {name: (2, overrides) for name, overrides in DEGREES.items()}
LAYOUTS |= {
    f"{one}_{other}": (4, [*DEGREES[one], *DEGREES[other]]) for one in DEGREES for other in DEGREES if one < other
}
LAYOUTS |= {
    name + "_sequence": (size, [*degrees, "parallel.sequence=true"])
    for name, (size, degrees) in LAYOUTS.items()
    if "tp2" in name
}


def gradients(world_size, weight, *overrides):
    """Of one step in which the balance loss has that weight."""
    model = ("model.routing=token_choice", f"model.balance_loss={weight}", "run.steps=1")
    return result_of(world_size, (*model, *overrides)).gradients


@cache
def one_process(way):
    return gradients(1, 100.0, *WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_the_balance_loss_is_most_of_what_moves_a_router_here(way):
    without, balanced = gradients(1, 1e-9, *WAYS[way]), one_process(way)
    for name in balanced:
        if name.endswith("router.weight"):
            assert (balanced[name] - without[name]).norm() > 3 * without[name].norm(), name


@pytest.mark.parametrize("layout", slow_but({"ep2_tp2_sequence", "dp2_pp2"}, LAYOUTS))
@pytest.mark.parametrize("way", WAYS)
def test_its_gradient_is_one_processs(layout, way):
    world_size, overrides = LAYOUTS[layout]
    found, expected = gradients(world_size, 100.0, *WAYS[way], *overrides), one_process(way)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-9 * gradient.norm(), name
