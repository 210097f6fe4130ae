"""The configuration of the optimizer, readable before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ZeroConfig:
    """0: AdamW and all-reduce, in the parameters' own precision (the oracle). 1: DeepSpeed ZeRO, sharded fp32 state.
    2: sharded gradients too, at the price of a reduction after every microbatch.
    """

    stage: Literal[0, 1, 2] = 1


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) after a linear warm-up; `clip` bounds the norm of the whole gradient (0: no bound)."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 0  # steps
    decay: Literal["constant", "cosine"] = "constant"
