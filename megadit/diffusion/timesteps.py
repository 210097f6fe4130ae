"""Which times are trained and sampled, and how they shift with resolution."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise (shift > 1), as larger images need (arXiv 2403.03206, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal_B: Tensor, mean: float, std: float, shift: float) -> Tensor:
    """Standard normal draws -> times in (0, 1) whose logit is normal (arXiv 2403.03206, section 3.1), then shifted."""
    return shift_time(torch.sigmoid(mean + std * normal_B), shift)


def sampling_times(steps: int, shift: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The grid from noise (1) to image (0), [steps + 1].

    >>> sampling_times(4, shift=1.0).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).to(dtype)
