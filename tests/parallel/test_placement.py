"""A parameter's placement: where each rank's part lies in the whole, and who owns it."""

import math

import pytest
import torch
from torch import nn

from megadit.parallel.placement import REPLICATED, Cut, Placement, placed, placement_of
from tests.parallel.places import Place, layouts_of, name_of

PLACEMENTS = {
    "replicated": REPLICATED,
    "partial": Placement(partial=("tp",)),
    "columns": Placement(cuts=(Cut(0, ("tp",)),)),
    "rows": Placement(cuts=(Cut(1, ("tp",)),)),
    "experts": Placement(cuts=(Cut(0, ("ep", "tp")),)),
    "experts_and_columns": Placement(cuts=(Cut(0, ("ep",)), Cut(1, ("tp",)))),
}
LOCAL = (2, 3)


def boxes(placement, layout):
    """(grid, logical shape, the slices of this rank's part) of every rank of the first stage."""
    for rank in range(layout.dp * layout.tp):
        grid = Place(layout, rank)
        begin = placement.offsets(LOCAL, grid)
        part = tuple(slice(b, b + n) for b, n in zip(begin, LOCAL, strict=True))
        yield grid, placement.logical_shape(LOCAL, grid), part


@pytest.mark.parametrize("layout", layouts_of(8), ids=name_of)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_owned_parts_tile_the_whole_exactly_once(placement, layout):
    cut = math.prod(getattr(layout, axis) for axis in placement.cut_axes)
    ((shape,),) = [{shape for _, shape, _ in boxes(placement, layout)}]
    assert math.prod(shape) == math.prod(LOCAL) * cut
    held, owned = torch.zeros(shape), torch.zeros(shape)
    for grid, _, part in boxes(placement, layout):
        assert held[part].shape == LOCAL
        held[part] += 1
        owned[part] += placement.is_owner(grid)
    assert (held == layout.dp * layout.tp // cut).all()
    assert (owned == 1).all()


@pytest.mark.parametrize("layout", layouts_of(8), ids=name_of)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_with_sharded_state_every_shard_has_one_owner(placement, layout):
    """Over the data axes every rank holds another range, so each of those ranks owns what it holds, once over tp."""
    owners = {}
    for grid, shape, part in boxes(placement, layout):
        if placement.is_owner(grid, sharded=placement.data_axes):
            count = owners.setdefault(grid.coordinate(placement.data_axes), torch.zeros(shape))
            count[part] += 1
    assert len(owners) == math.prod(getattr(layout, axis) for axis in placement.data_axes)
    assert all((count == 1).all() for count in owners.values())


def test_parts_of_two_axes_lie_with_the_last_axis_fastest():
    (layout,) = [layout for layout in layouts_of(8) if layout.sizes == (1, 2, 2, 2)]
    begin = [PLACEMENTS["experts"].offsets((3, 5), Place(layout, rank)) for rank in range(8)]
    assert begin == [(0, 0), (3, 0), (6, 0), (9, 0)] * 2


@pytest.mark.parametrize(
    ("name", "cut_axes", "data_axes"),
    [
        ("replicated", set(), ("edp", "ep")),
        ("partial", set(), ("edp", "ep")),
        ("columns", {"tp"}, ("edp", "ep")),
        ("experts", {"ep", "tp"}, ("edp",)),
    ],
)
def test_gradients_are_summed_over_the_replicas(name, cut_axes, data_axes):
    assert PLACEMENTS[name].cut_axes == cut_axes
    assert PLACEMENTS[name].data_axes == data_axes


def test_a_placed_parameter_keeps_its_tag():
    parameter = placed((2, 3), PLACEMENTS["rows"], dtype=torch.float64)
    assert (parameter.shape, parameter.dtype, parameter.requires_grad) == ((2, 3), torch.float64, True)
    assert placement_of(parameter) is PLACEMENTS["rows"]
    assert placement_of(placed((2,))) is REPLICATED


def test_a_parameter_without_a_tag_is_found():
    with pytest.raises(AssertionError, match=r"shape \(2, 3\) has no placement"):
        placement_of(nn.Parameter(torch.zeros(2, 3)))
