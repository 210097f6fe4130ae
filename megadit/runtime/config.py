"""The configuration of the watchdog, readable before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WatchdogConfig:
    """When ranks count as lost. Seconds."""

    hang: float = 600.0  # without progress; 0: no watchdog
    startup: float = 1800.0  # the same before the first step is done, while saving, evaluating or drawing
    silent: float = 60.0  # without a heartbeat of a rank
