"""Every layout starts from the same weights, and the weights have the moments that their names promise."""

import pytest
import torch

from megadit.parallel.init import Constant, Normal, Xavier, initialise
from megadit.parallel.placement import Cut, Placement, placed
from megadit.runtime.seed import stream
from tests.parallel.places import Place, coordinates, layouts_of, name_of

(ALONE,) = layouts_of(1)
EXPERTS = Placement(cuts=(Cut(0, ("ep", "tp")),))
WHOLE = (8, 16, 3)
UNIT = Normal(1.0)
CASES = {
    "replicated": (Placement(), lambda pp, edp, ep, tp, layout: slice(None)),
    "columns": (
        Placement(cuts=(Cut(0, ("tp",)),)),
        lambda pp, edp, ep, tp, layout: torch.arange(8).chunk(layout.tp)[tp],
    ),
    "rows": (
        Placement(cuts=(Cut(1, ("tp",)),)),
        lambda pp, edp, ep, tp, layout: (slice(None), torch.arange(16).chunk(layout.tp)[tp]),
    ),
    "experts": (EXPERTS, lambda pp, edp, ep, tp, layout: torch.arange(8).view(layout.ep, layout.tp, -1)[ep, tp]),
}


def started(placement, local_shape, grid, name="w", seed=0, init=UNIT, dtype=torch.float32):
    parameter = placed(local_shape, placement, dtype=dtype)
    initialise([(name, parameter)], grid, seed, lambda name: init)
    return parameter.detach()


@pytest.mark.parametrize("layout", layouts_of(8), ids=name_of)
@pytest.mark.parametrize("case", CASES)
def test_each_rank_starts_with_its_slice_of_one_process_start(case, layout):
    placement, part_of = CASES[case]
    whole = started(placement, WHOLE, Place(ALONE, 0))
    for rank in range(8):
        part = whole[part_of(*coordinates(layout, rank), layout)]
        assert torch.equal(started(placement, part.shape, Place(layout, rank)), part)


def test_every_expert_has_a_stream_of_its_own():
    eight, four = (started(EXPERTS, (count, 5, 3), Place(ALONE, 0), name="up", seed=2) for count in (8, 4))
    assert torch.equal(eight[:4], four)
    for index, expert in enumerate(eight):
        assert torch.equal(expert, torch.randn(5, 3, generator=stream(2, "up", index)))
    assert len({tuple(expert.flatten().tolist()) for expert in eight}) == 8


def test_weights_depend_on_seed_and_name_and_not_on_order_or_precision():
    grid = Place(ALONE, 0)
    a, b = placed((4, 3)), placed((4, 3))
    initialise([("b", b), ("a", a)], grid, 0, lambda name: Xavier())
    assert torch.equal(a, started(Placement(), (4, 3), grid, "a", init=Xavier()))
    assert not torch.equal(a, b)
    assert not torch.equal(a, started(Placement(), (4, 3), grid, "a", seed=1, init=Xavier()))
    assert torch.equal(a.double(), started(Placement(), (4, 3), grid, "a", init=Xavier(), dtype=torch.float64))


def test_initialising_records_no_gradient():
    parameter = placed((4, 3))
    initialise([("w", parameter)], Place(ALONE, 0), 0, lambda name: Normal(1.0))
    assert parameter.is_leaf and parameter.requires_grad and parameter.grad_fn is None


def test_normal_has_its_standard_deviation():
    x = Normal(0.02).draw((400, 500), stream(0))
    assert x.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(x.mean().item()) < 5 * 0.02 / 200_000**0.5
    assert ((x / 0.02) ** 4).mean().item() == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("gain", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(300, 500), (4, 300, 500)])
def test_xavier_is_uniform_with_glorots_variance_of_the_last_two_dims(gain, shape):
    x = Xavier(gain).draw(shape, stream(0))
    variance = gain**2 * 2 / 800
    assert x.var().item() == pytest.approx(variance, rel=0.01)
    assert abs(x.mean().item()) < 5 * (variance / x.numel()) ** 0.5
    assert (3 * variance) ** 0.5 * 0.999 < x.abs().max().item() <= (3 * variance) ** 0.5 * (1 + 1e-6)
    assert (x**4).mean().item() / variance**2 == pytest.approx(1.8, rel=0.02)


def test_a_constant_is_constant():
    assert Constant(0.5).draw((2, 3), stream(0)).tolist() == [[0.5] * 3] * 2
