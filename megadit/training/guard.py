"""What a run does about bad numbers, flipped bits, and the end of its time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardConfig:
    """Bad numbers, flipped bits, and the end of the time that a run has."""

    max_skips: int = 10  # steps among the last `window` that may be left out for a loss or gradient that is not finite
    spike: float = 0.0  # robust z-score of a loss or gradient norm from which the run goes back (0: never), such as 8
    window: int = 100  # steps
    max_rewinds: int = 3  # times that a run goes back before it stops
    checksum_every: int = 0  # steps between comparisons of replicated parameters, and before each save (0: never)
    time_limit: float = 0.0  # minutes from the start of the process until it saves and stops (0: none)
