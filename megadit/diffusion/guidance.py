"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), both branches in one batch, where it is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadit.diffusion.sampler import Network

SLACK = 1e-6  # of a limit in time, for grids that meet it but for rounding


@dataclass(frozen=True)
class Guidance:
    """How strongly images are steered towards what is told, and when.

    scale 1: not at all. rescale: how far a guided velocity is brought back to the spread of the conditional one, 0 to
    1. Guided are times from `begin` to `end` alone (Kynkaanniemi et al., arXiv 2404.07724).
    """

    scale: float
    rescale: float = 0.0
    begin: float = 0.0
    end: float = 1.0

    def applies(self, time: float) -> bool:
        """Whether images at this time are guided.

        >>> [Guidance(3.0, begin=0.2, end=0.8).applies(t) for t in (0.1, 0.2, 0.8, 1.0)], Guidance(1.0).applies(0.5)
        ([False, True, True, False], False)
        """
        return self.scale != 1 and self.begin - SLACK <= time <= self.end + SLACK


def guided(conditional: Network, both: Network, guidance: Guidance) -> Network:
    """A network over B samples from one that is told what to draw, and one over 2B that is told so for the first half.

    v = v_uncond + scale (v_cond - v_uncond), where guidance applies; elsewhere v_cond, and the other branch is not
    evaluated. A batch is at one time. Times on the CPU spare a wait for the device in each call.
    """

    def velocity(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        if not guidance.applies(float(timesteps_B[0])):
            return conditional(x_BCHW, timesteps_B)
        halves = both(torch.cat([x_BCHW, x_BCHW]), torch.cat([timesteps_B, timesteps_B])).chunk(2)
        told, untold = halves
        steered = untold + guidance.scale * (told - untold)
        return rescaled(steered, told, guidance.rescale) if guidance.rescale else steered

    return velocity


def rescaled(guided_BCHW: Tensor, conditional_BCHW: Tensor, share: float) -> Tensor:
    """A guided velocity whose standard deviation is, to this share, the conditional one's, for each image.

    Guidance makes it larger, and images overexposed (Lin et al., arXiv 2305.08891, equations 14 to 16; their phi).
    """
    spread_B = guided_BCHW.flatten(1).std(dim=1)
    ratio_B = torch.where(spread_B > 0, conditional_BCHW.flatten(1).std(dim=1) / spread_B, 1.0)
    return guided_BCHW * (share * ratio_B + (1 - share)).view(-1, 1, 1, 1)
