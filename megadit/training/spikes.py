"""Losses and gradient norms that stand out from those before them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

SIGMA = 1.4826  # standard deviations in a median absolute deviation of normal numbers
LEAST_SPREAD = 0.01  # of the logarithm: what is nearly constant would make a spike of nothing


def robust_z(value: float, history: Iterable[float]) -> float:
    """How many robust standard deviations `value` lies above the median of the history.

    The median and the median absolute deviation, which single outliers do not move (Iglewicz and Hoaglin, 1993).

    >>> round(robust_z(5.0, [1.0, 1.1, 0.9, 1.2, 0.8]), 2)
    26.98
    """
    history = list(history)
    middle = median(history)
    spread = SIGMA * median(abs(old - middle) for old in history)
    return (value - middle) / max(spread, LEAST_SPREAD)


class SpikeDetector:
    """Compares each step with the last ones, on a logarithmic scale: both quantities change by factors."""

    def __init__(self, threshold: float, window: int) -> None:
        """`threshold`: robust z-score of a spike. `window`: steps to compare with, at least half of them."""
        self.threshold = threshold
        self._history: dict[str, deque[float]] = {key: deque(maxlen=window) for key in ("loss", "gradient norm")}

    def look(self, loss: float, grad_norm: float) -> str | None:
        """What stands out about a step, if anything does; what does is not compared with later."""
        logs = {"loss": _log(loss), "gradient norm": _log(grad_norm)}
        for (key, history), value, raw in zip(self._history.items(), logs.values(), (loss, grad_norm), strict=True):
            if len(history) >= max(2, (history.maxlen or 0) // 2):
                score = robust_z(value, history)
                if score > self.threshold:
                    above = f"{score:.1f} robust standard deviations above the last {len(history)} steps"
                    return f"{key} {raw:.4g} is {above}"
        for history, value in zip(self._history.values(), logs.values(), strict=True):
            history.append(value)
        return None


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))
