"""Initialisation by name: each logical tensor is drawn whole from its own random stream, then cut.

So every layout starts from bitwise equal weights, and there is nothing to broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of
from megadit.runtime.seed import stream


@dataclass(frozen=True)
class Constant:
    """Every element equals `value`."""

    value: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.value)


@dataclass(frozen=True)
class Normal:
    """Independent normal elements of standard deviation `std`."""

    std: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # In float64, then rounded: float32 normals differ between CPUs of different vector width.
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * self.std).float()


@dataclass(frozen=True)
class Xavier:
    """Uniform with the variance gain^2 * 2 / (fan_in + fan_out) of Glorot and Bengio (2010), for the last two dims."""

    gain: float = 1.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        bound = self.gain * math.sqrt(6.0 / (shape[-1] + shape[-2]))
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound


Init = Constant | Normal | Xavier


@torch.no_grad()
def initialise(
    parameters: Iterable[tuple[str, nn.Parameter]], grid: Grid, seed: int, init_of: Callable[[str], Init]
) -> None:
    """Fill parameters in place, each from the stream (seed, its global name), in fp32 on the CPU.

    A tensor whose dimension 0 is cut over the expert axis holds one expert per index there: each index has a stream
    of its own, so that a rank draws its own experts only.
    """
    for name, parameter in parameters:
        placement, init = placement_of(parameter), init_of(name)
        shape = placement.logical_shape(parameter.shape, grid)
        offsets = placement.offsets(parameter.shape, grid)
        if "ep" in placement.cut_axes:
            for local in range(parameter.shape[0]):
                parameter[local].copy_(init.draw(shape[1:], stream(seed, name, offsets[0] + local)))
        else:
            whole = init.draw(shape, stream(seed, name))
            for dim, (begin, length) in enumerate(zip(offsets, parameter.shape, strict=True)):
                whole = whole.narrow(dim, begin, length)
            parameter.copy_(whole)
