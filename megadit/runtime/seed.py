"""What makes runs repeat: random streams that are functions of their names, never of the rank, and exact kernels."""

from __future__ import annotations

import hashlib
import os

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


def use_deterministic_kernels() -> None:
    """From now on only kernels that repeat bit for bit; torch raises RuntimeError, by name, where there is none.

    Costs time on a GPU, where sums into an index are sorted instead of made with atomics. Call it before the first
    matrix product there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    # A debugging aid, at the cost of every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
