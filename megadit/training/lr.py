"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megadit.zero.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 1) of `steps`: linear warm-up, then constant or a half cosine to zero.

    >>> from megadit.zero import OptimConfig
    >>> [learning_rate(OptimConfig(lr=1.0, warmup=2), step, 4) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 1.0]
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.decay == "constant":
        return config.lr
    done = (step - config.warmup - 1) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
