"""Modules in this process: a grid of one rank, a small configuration, and weights that are nowhere zero or one."""

import pytest
import torch
import torch.distributed as dist

from megadit.model.config import ECDiTConfig
from megadit.model.text import TextConfig
from megadit.parallel.grid import Grid, Layout
from megadit.parallel.init import Normal, initialise
from megadit.parallel.tensor.mappings import ReplicatedTokens


@pytest.fixture(scope="module")
def grid():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Grid(Layout(1, 1, 1, 1), 0)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def region(grid):
    return ReplicatedTokens(grid["tp"])


@pytest.fixture(scope="module")
def filled(grid):
    """A function that turns a module into float64 and gives every parameter normal elements of deviation 0.2."""

    def fill(module):
        module.to(torch.float64)
        initialise(module.named_parameters(), grid, 1, lambda name: Normal(0.2))
        return module

    return fill


@pytest.fixture(scope="module")
def config():
    """Grouped-query attention, QK-norm, ungated; layers 1 and 3 of four have experts."""
    shape = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 6, "experts": 4}
    return ECDiTConfig(**shape, image_size=8, channels=3, patch=2)


@pytest.fixture(scope="module")
def text():
    return TextConfig(vocabulary=20, length=6, width=16, layers=2, heads=2)


@pytest.fixture
def randn():
    """Normal float64 draws, the same in every run of a test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
