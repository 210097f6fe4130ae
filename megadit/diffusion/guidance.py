"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), both branches in one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megadit.diffusion.sampler import Network


def guided(network: Network, scale: float) -> Network:
    """A network over B samples from one over 2B whose first half is conditional and second half unconditional.

    v = v_uncond + scale (v_cond - v_uncond); scale 1 is no guidance.
    """

    def velocity(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        both = network(torch.cat([x_BCHW, x_BCHW]), torch.cat([timesteps_B, timesteps_B]))
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity
