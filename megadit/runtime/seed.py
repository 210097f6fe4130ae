"""Random streams that are functions of their names, never of the rank: the base of "same start everywhere"."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU generator that depends on (seed, keys) alone.

    Keys are hashed with their types and lengths, so that ("ab", "c") and ("a", "bc") or 1 and "1" differ.

    >>> float(torch.rand((), generator=stream(0, "w", 1))) == float(torch.rand((), generator=stream(0, "w", 1)))
    True
    >>> float(torch.rand((), generator=stream(0, "w", 1))) == float(torch.rand((), generator=stream(0, "w", "1")))
    False
    """
    digest = hashlib.blake2b(repr((int(seed), *keys)).encode(), digest_size=8).digest()
    # torch takes any signed 64-bit seed.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
