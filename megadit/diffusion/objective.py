"""Rectified flow (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206): straight paths from data to noise."""

from __future__ import annotations

import torch
from torch import Tensor


def corrupt(clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
    """The point at time t of the line from the image (t = 0) to the noise (t = 1), and the velocity along it.

    Returns (x_t, target), both [B, C, H, W]: x_t = (1 - t) x_0 + t noise and target = noise - x_0.
    """
    t_B111 = timesteps_B.view(-1, 1, 1, 1)
    return (1 - t_B111) * clean_BCHW + t_B111 * noise_BCHW, noise_BCHW - clean_BCHW


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity per sample, [B], so that each sample weighs alike; at least in float32.

    Of whole images [B, C, H, W], or of the patches that were seen, [B, T, C p p].
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)
