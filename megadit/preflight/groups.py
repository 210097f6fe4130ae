"""Every group of every layout can be made, and its ranks reach one another."""

from __future__ import annotations

from typing import Any

import torch

from megadit.preflight.station import GROUPS, Station
from megadit.preflight.verdict import Verdict


def measure(station: Station) -> int:
    """The first collective over a group is what connects its ranks."""
    count = 0
    for name, layout, _ in station.layouts():
        station.mark(f"making the groups of {name}")
        grid = station.grid(layout)
        for axis in GROUPS:
            station.mark(f"the first all-reduce of {axis} in {name}")
            total = grid[axis].all_reduce(torch.ones(1, device=station.process.device))
            if float(total) != grid[axis].size:
                raise ValueError(f"{float(total):.0f} ranks answered in a group of {grid[axis].size}")
            count += 1
    return count


def judge(station: Station, found: list[Any]) -> Verdict:
    names = [name for name, _, _ in station.layouts()]
    return Verdict(f"{found[0]} groups of each rank, in {len(names)} layouts", table=names)
