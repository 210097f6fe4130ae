"""Every layout trains as one process does: losses and gradient norms of a small EC-DiT, on the real backend.

Every rank makes the training alone first, which also shows a device that computes something else than the others.
"""

from __future__ import annotations

import math
from statistics import median_low
from typing import Any

from megadit.checkpoint import Saver
from megadit.preflight.station import Station
from megadit.preflight.training import EXACT, SHARDED, WHOLE, OwnGrid, configuration, train
from megadit.preflight.verdict import Verdict
from megadit.training.build import read_inputs

# Relative. float32 rounds to 6e-8, and a sum of many terms loses a few bits more.
TOLERANCES = {EXACT: 1e-9, SHARDED: 2e-5}
REFERENCES = {EXACT: EXACT, SHARDED: WHOLE}


def measure(station: Station) -> dict[str, Any]:
    settings, process = station.settings, station.process

    def config(chosen: Any, precision: str) -> Any:
        return configuration(settings.layouts, process.world_size, chosen, precision, settings.steps)

    inputs = read_inputs(config(None, EXACT))
    saver = Saver(config(None, EXACT).directory)  # a part of a run; nothing is saved
    alone: dict[str, list[float]] = {}
    layouts: dict[str, dict[str, list[float]]] = {}
    grid = OwnGrid()
    for precision in REFERENCES.values():
        station.mark(f"the training alone in {precision}")
        alone[precision] = train(config(None, precision), grid, inputs, process, saver)
    for name, layout, chosen in station.layouts():
        layouts[name] = {}
        for precision in TOLERANCES:
            station.mark(f"{precision} in {name}")
            layouts[name][precision] = train(config(chosen, precision), station.grid(layout), inputs, process, saver)
    return {"alone": alone, "layouts": layouts}


def deviation(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; infinite for what is no number.

    >>> deviation([1.0, 2.0], [1.0, 4.0]), deviation([math.nan], [1.0])
    (0.5, inf)
    """
    differences = [abs(a / b - 1) if b else abs(a - b) for a, b in zip(found, expected, strict=True)]
    return max(each if math.isfinite(each) else math.inf for each in differences)


def judge(station: Station, found: list[Any]) -> Verdict:
    verdict = Verdict()
    usual = {
        precision: [median_low(values) for values in zip(*(each["alone"][precision] for each in found), strict=True)]
        for precision in found[0]["alone"]
    }
    for precision, expected in usual.items():
        for rank, each in enumerate(found):
            apart = deviation(each["alone"][precision], expected)
            if not apart <= TOLERANCES[EXACT]:
                verdict.faults.append(
                    f"{station.names([rank])} trains otherwise than the other ranks when each trains alone "
                    f"({precision}): by {apart:.1e}"
                )
    rows: dict[str, dict[str, float]] = {}
    worst = dict.fromkeys(TOLERANCES, 0.0)
    for name, _, _ in station.layouts():
        for precision, tolerance in TOLERANCES.items():
            expected = usual[REFERENCES[precision]]
            deviations = [deviation(each["layouts"][name][precision], expected) for each in found]
            rows.setdefault(name, {})[precision] = max(deviations)
            worst[precision] = max(worst[precision], *deviations)
            wrong = [rank for rank, each in enumerate(deviations) if not each <= tolerance]
            if wrong:
                verdict.faults.append(
                    f"{name} in {precision} differs from one process by {max(deviations):.1e}, more than "
                    f"{tolerance:.0e}, on {station.names(wrong)}"
                )
    shown = ", ".join(f"{each} {worst[each]:.1e} (at most {TOLERANCES[each]:.0e})" for each in worst)
    verdict.summary = f"losses and norms of {station.settings.steps} steps; {shown}"
    width = max(map(len, rows))
    verdict.table = [
        f"{name:<{width}s}  " + "  ".join(f"{precision} {value:.1e}" for precision, value in row.items())
        for name, row in rows.items()
    ]
    verdict.figures = {"alone": usual, "deviations": rows}
    return verdict
