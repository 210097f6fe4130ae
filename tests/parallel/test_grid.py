"""The layout of the ranks, and the collectives of every group against plain torch."""

import itertools
import math

import pytest
import torch

from megadit.parallel.grid import AXES, UNIONS, Grid, Layout
from megadit.parallel.layout import ParallelConfig
from tests.parallel.places import Place, coordinates, layouts_of, name_of
from tests.ranks import run_ranks

GROUPS = {axis: (axis,) for axis in AXES} | UNIONS


@pytest.mark.parametrize(
    ("degrees", "world_size", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 8, (1, 8, 1, 1)),
        ({"tensor": 2, "pipeline": 4}, 8, (4, 1, 1, 2)),
        ({"tensor": 2, "pipeline": 3, "expert": 5}, 60, (3, 2, 5, 2)),
    ],
)
def test_what_the_degrees_leave_is_data_parallel(degrees, world_size, sizes):
    layout = Layout.of(ParallelConfig(**degrees), world_size)
    assert layout.sizes == (layout.pp, layout.edp, layout.ep, layout.tp) == sizes
    assert layout.dp == sizes[1] * sizes[2]
    assert layout.ranks.flatten().tolist() == list(range(world_size))


@pytest.mark.parametrize("world_size", [1, 4, 10])
def test_degrees_that_do_not_divide_the_world_are_refused(world_size):
    with pytest.raises(ValueError, match=f"= 8 does not divide the {world_size} processes .* a multiple of 8"):
        Layout.of(ParallelConfig(tensor=2, pipeline=2, expert=2), world_size)


@pytest.mark.parametrize("layout", layouts_of(8), ids=name_of)
def test_the_groups_of_every_axis_and_union_partition_the_world(layout):
    for axes in GROUPS.values():
        groups = [layout.members(axes, rank) for rank in range(8)]
        assert all(rank in members for rank, members in enumerate(groups))
        assert sorted(itertools.chain(*set(map(tuple, groups)))) == list(range(8))
        assert {len(members) for members in groups} == {math.prod(getattr(layout, axis) for axis in axes)}


@pytest.mark.parametrize("layout", layouts_of(8), ids=name_of)
def test_tensor_ranks_are_neighbours_and_data_ranks_are_ordered_edp_then_ep(layout):
    for rank in range(8):
        pp, edp, ep, tp = coordinates(layout, rank)
        block = layout.dp * layout.tp  # of one pipeline stage
        assert layout.members(("tp",), rank) == list(range(rank - tp, rank - tp + layout.tp))
        assert layout.members(("ep",), rank) == [rank + (i - ep) * layout.tp for i in range(layout.ep)]
        assert layout.members(UNIONS["dp"], rank) == [block * pp + i * layout.tp + tp for i in range(layout.dp)]
        assert layout.members(("pp",), rank) == [rank + (i - pp) * block for i in range(layout.pp)]
        assert layout.members(UNIONS["world"], rank) == list(range(8))


@pytest.mark.parametrize("layout", layouts_of(8), ids=name_of)
def test_coordinates_of_a_grid(layout):
    for rank in range(8):
        grid, (pp, edp, ep, tp) = Place(layout, rank), coordinates(layout, rank)
        assert [grid[axis].rank for axis in AXES] == [pp, edp, ep, tp]
        assert grid["dp"].rank == edp * layout.ep + ep == grid.coordinate(("edp", "ep"))
        assert grid.coordinate(("ep", "tp")) == ep * layout.tp + tp
        assert grid.coordinate(()) == 0
        assert (grid.size(("ep", "tp")), grid.size(())) == (layout.ep * layout.tp, 1)


def held_by(rank, contiguous):
    """What a rank brings to the collectives; whole numbers, so that sums are exact in any order."""
    x = torch.randint(-99, 99, (4, 8, 12), generator=torch.Generator().manual_seed(rank)).double()
    return x if contiguous else x.transpose(0, 2)


def rows_between(source, destination):
    """How many rows one rank sends to another: uneven, and none on some ways."""
    return (3 * source + 2 * destination) % 4


def exchange_ragged(group, members, rank, contiguous):
    """(what the group's exchange of uneven parts gives, what it should): each rank's rows, cut into parts in order."""

    def parts(source):
        rows = [rows_between(source, member) for member in members]
        x = held_by(source, contiguous).repeat(4, 1, 1)[: sum(rows)]
        return x, rows

    x, sent = parts(rank)
    received = [rows_between(member, rank) for member in members]
    arriving = [x.split(rows)[members.index(rank)] for x, rows in map(parts, members)]
    return group.all_to_all_ragged(x, sent, received), torch.cat(arriving), x


def collectives(rank, world_size, layout):
    """The faults of this rank's groups, as text."""
    grid, faults = Grid(layout, rank), []
    for (name, axes), contiguous in itertools.product(GROUPS.items(), (True, False)):
        group, members = grid[name], layout.members(axes, rank)
        x = held_by(rank, contiguous)
        inputs = [held_by(member, contiguous) for member in members]
        place, size, total = members.index(rank), len(members), sum(inputs)
        exchanged = torch.cat([other.chunk(size)[place] for other in inputs])
        results = {"all_reduce": (group.all_reduce(x), total), "all_to_all": (group.all_to_all(x), exchanged)}
        for dim in (0, 1, 2, -1):
            results[f"all_gather {dim}"] = group.all_gather(x, dim), torch.cat(inputs, dim)
            results[f"reduce_scatter {dim}"] = group.reduce_scatter(x, dim), total.chunk(size, dim)[place]
            results[f"split {dim}"] = group.split(x, dim), x.chunk(size, dim)[place]
        ragged, uneven, sent = exchange_ragged(group, members, rank, contiguous)
        if not torch.equal(ragged, uneven):
            faults.append(f"all_to_all_ragged over {name}, contiguous={contiguous}: wrong result")
        if (ragged is sent) != (size == 1) or not (size == 1 or ragged.is_contiguous()):
            faults.append(f"all_to_all_ragged over {name}, contiguous={contiguous}: wrong tensor")
        for operation, (found, expected) in results.items():
            where = f"{operation} over {name}, contiguous={contiguous}"
            if not torch.equal(found, expected):
                faults.append(f"{where}: wrong result")
            if (found is x) if size > 1 else (found is not x):
                faults.append(f"{where}: must be the argument itself over a group of one, and only there")
            if size > 1 and not found.is_contiguous():
                faults.append(f"{where}: the result is not contiguous")
        if not torch.equal(x, held_by(rank, contiguous)):
            faults.append(f"an argument over {name} changed")
    return faults


@pytest.mark.parametrize(
    "layout", [Layout(1, 4, 1, 1), Layout(2, 1, 1, 2), Layout(1, 1, 2, 2), Layout(1, 2, 2, 1)], ids=name_of
)
def test_every_collective_of_every_group_is_what_plain_torch_computes(layout):
    assert run_ranks(collectives, 4, layout) == [[]] * 4
