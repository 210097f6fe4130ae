"""How far the hosts' clocks are apart: logs of several hosts are read side by side, and certificates have dates."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megadit.preflight.station import Station
from megadit.preflight.verdict import Verdict

PINGS = 8


def measure(station: Station) -> dict[str, float] | None:
    """This host's clock against rank 0's, on one rank of each host; None elsewhere.

    The exchange with the shortest round trip counts (RFC 5905, section 10): the answer was written within it.
    """
    speakers = [ranks[0] for ranks in station.hosts().values()]
    me = station.process.rank
    if me not in speakers or len(speakers) == 1:
        return None
    station.mark("pings of the hosts' clocks")
    group = dist.new_group(speakers, backend="gloo", use_local_synchronization=True)
    if me == speakers[0]:
        for other in speakers[1:]:
            for _ in range(PINGS):
                answer(group, other)
        return None
    return min((ping(group, speakers[0]) for _ in range(PINGS)), key=lambda each: each["error"])


def answer(group: dist.ProcessGroup, other: int) -> None:
    """Tell who asks what time it is here."""
    dist.recv(torch.empty(1), src=other, group=group)
    dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=other, group=group)


def ping(group: dist.ProcessGroup, server: int) -> dict[str, float]:
    """Seconds that this clock is ahead of the server's, and by how much that may be wrong."""
    there = torch.empty(1, dtype=torch.float64)
    sent = time.time()
    dist.send(torch.empty(1), dst=server, group=group)
    dist.recv(there, src=server, group=group)
    received = time.time()
    return {"offset": (sent + received) / 2 - float(there), "error": (received - sent) / 2}


def judge(station: Station, found: list[Any]) -> Verdict:
    offsets = {station.members[rank].host: each for rank, each in enumerate(found) if each is not None}
    if not offsets:
        return Verdict("one host: nothing to compare", skipped=True)
    widest = max(offsets.values(), key=lambda each: abs(each["offset"]))
    verdict = Verdict(f"{len(offsets) + 1} hosts, at most {widest['offset']:+.4f} s +- {widest['error']:.4f} s apart")
    verdict.warnings = [
        f"the clock of {host} is {each['offset']:+.3f} s +- {each['error']:.3f} s from {station.members[0].host}'s"
        for host, each in offsets.items()
        if abs(each["offset"]) - each["error"] > station.settings.max_skew_s
    ]
    verdict.figures = offsets
    return verdict
