"""The exponential moving average of the weights: what is sampled from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EmaConfig:
    """`decay` is reached gradually: early on the average forgets its start faster."""

    decay: float = 0.999


class Ema:
    """Averages of this rank's own parameters, at least in float32: in bf16 a step would change nothing."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], config: EmaConfig) -> None:
        self.config = config
        self.parameters: list[Tensor] = [parameter for _, parameter in named]
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(
                torch.promote_types(parameter.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True
            )
            for name, parameter in named
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step` (from 1): average <- d average + (1 - d) weights; d = min(decay, step / (step + 9))."""
        decay = min(self.config.decay, step / (step + 9))
        # One at a time, so that of bf16 weights there is no second, wider copy.
        for average, parameter in zip(self.average.values(), self.parameters, strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """The model's parameters become the averages."""
        torch._foreach_copy_(self.parameters, list(self.average.values()))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the model's parameters hold the averages."""
        with torch.no_grad():
            kept = [parameter.clone() for parameter in self.parameters]
            self.copy_to_parameters()
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, kept)
