"""A flipped bit in a replicated parameter is found, with the rank that has it."""

import pytest
import torch

from megadit.parallel.grid import Grid, Layout
from megadit.parallel.placement import REPLICATED, Cut, Placement, placed
from megadit.parallel.replicas import Difference, checksum, differing_replicas
from tests.ranks import run_ranks

PLACEMENTS = {
    "replicated": REPLICATED,
    "column": Placement((Cut(0, ("tp",)),)),
    "expert": Placement((Cut(0, ("ep", "tp")),)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_single_bit_changes_the_checksum(dtype):
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    whole, size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()], tensor.element_size() * 8
    seen = {int(checksum(tensor))}
    for bit in range(size):
        flipped = tensor.clone()
        flipped.view(whole)[3, 1] ^= torch.tensor(-(2 ** (size - 1)) if bit == size - 1 else 1 << bit, dtype=whole)
        seen.add(int(checksum(flipped)))
    assert len(seen) == size + 1


def found_on(rank, world_size, layout, dtype, flips):
    """What a rank finds after (rank, name) have each had a bit flipped."""
    grid = Grid(layout, rank)
    named = []
    for index, (name, placement) in enumerate(PLACEMENTS.items()):
        parameter = placed((4, 3), placement, dtype=dtype)
        own = grid.coordinate(placement.cuts[0].axes) if placement.cuts else 0
        generator = torch.Generator().manual_seed(100 * index + own)
        with torch.no_grad():
            parameter.copy_(torch.randn(4, 3, generator=generator))
            if (rank, name) in flips:
                whole = torch.int16 if dtype == torch.bfloat16 else torch.int32
                parameter.data.view(whole)[2, 1] ^= 1
        named.append((name, parameter))
    return differing_replicas(named, grid)


CASES = [
    # layout, flips, what is found: the odd one out where there is a majority, else all that differ
    (Layout(1, 1, 2, 2), [], []),
    (Layout(1, 1, 2, 2), [(3, "replicated")], [Difference("replicated", (3,))]),
    (Layout(1, 4, 1, 1), [(2, "expert")], [Difference("expert", (2,))]),
    (Layout(1, 1, 2, 2), [(1, "column")], [Difference("column", (1, 3))]),
    (Layout(1, 1, 2, 2), [(1, "expert")], []),  # nobody else has it
    (Layout(1, 2, 2, 1), [(1, "expert")], [Difference("expert", (1, 3))]),
    (Layout(2, 1, 2, 1), [(2, "column")], [Difference("column", (2, 3))]),  # of the second stage
    (Layout(1, 4, 1, 1), [(0, "column"), (3, "replicated")], [Difference("column", (0,)), Difference("replicated", (3,))]),
]


@pytest.mark.parametrize(("layout", "flips", "expected"), CASES)
def test_the_ranks_that_differ_are_found_by_all(layout, flips, expected):
    assert run_ranks(found_on, 4, layout, torch.float32, flips) == [expected] * 4


def test_bfloat16_is_compared_by_its_bits():
    expected = [Difference("column", (1,))]
    assert run_ranks(found_on, 4, Layout(1, 4, 1, 1), torch.bfloat16, [(1, "column")]) == [expected] * 4
