"""The configuration of the objective and what follows from it alone, readable before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which times are trained (logit-normal, then shifted), and what the network does not get to see."""

    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    shift_tokens: int = 0  # images of so many tokens have shift, and sample.shift; others in proportion; 0: all alike
    caption_dropout: float = 0.1  # how often it is told nothing, for guidance
    keep_tokens: float = 1.0  # fraction of an image's tokens that it sees in training (MaskDiT, arXiv 2306.09305)


def kept_tokens(tokens: int, fraction: float) -> int:
    """How many of an image's tokens are seen, at least one.

    >>> kept_tokens(256, 0.5), kept_tokens(15, 0.5), kept_tokens(16, 1.0), kept_tokens(4, 0.1)
    (128, 8, 16, 1)
    """
    return max(1, round(tokens * fraction))


def shift_of(shift: float, tokens: int, shift_tokens: int) -> float:
    """The shift of an image of `tokens`, where `shift` is meant for images of `shift_tokens` (0: for all of them).

    The square root of the ratio of their sizes (arXiv 2403.03206, equation 23): more pixels average more noise away.

    >>> shift_of(3.0, 1024, 256), shift_of(3.0, 64, 256), shift_of(3.0, 1024, 0)
    (6.0, 1.5, 3.0)
    """
    return shift * math.sqrt(tokens / shift_tokens) if shift_tokens else shift
