"""Wall time and peak memory of a step."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Clock:
    """Seconds between laps, on the host's monotonic clock.

    It does not wait for the device: the step's own read of loss and gradient norm is what waits, once per step.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap (or since construction)."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 1e9 bytes: allocated on the CUDA device, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # ru_maxrss is in kibibytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
