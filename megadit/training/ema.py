"""The exponential moving average of the weights: what is sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from megadit.training.config import EmaConfig
from megadit.zero.groups import Engine, Fragment


class Ema:
    """Averages of the engine's masters, cut as those are: in bf16 parameters a step would often change nothing."""

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.engine, self.config = engine, config
        self.masters = engine.masters()
        self.averages: list[Fragment] = [
            replace(master, kind="ema", flat=master.flat.detach().clone()) for master in self.masters
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step` (from 1): average <- d average + (1 - d) master; d = min(decay, step / (step + 9))."""
        decay = min(self.config.decay, step / (step + 9))
        for average, master in zip(self.averages, self.masters, strict=True):
            average.flat.lerp_(master.flat, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the model's parameters are the averages, and `averages` the masters. Collective."""
        self._swap()
        yield  # no `finally`: a rank that fails must not wait for others in the collective of swapping back
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # One fragment at a time: a third copy of them all may not fit.
        for average, master in zip(self.averages, self.masters, strict=True):
            kept = master.flat.clone()
            master.flat.copy_(average.flat)
            average.flat.copy_(kept)
        self.engine.masters_changed()
