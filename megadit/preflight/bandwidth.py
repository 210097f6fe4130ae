"""How long each group's collectives take, for a short message and for long ones; and which group is behind its peers.

All groups of an axis work at once, as they do in a training: they share links as they will then. The calls are
megadit's own, with the copies that a gather or a scatter makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadit.parallel.grid import UNIONS, Group
from megadit.parallel.layout import Layout
from megadit.preflight.station import GROUPS, Station
from megadit.preflight.verdict import Verdict

SHORT = 1024  # bytes
KIB, MIB = 2**10, 2**20
# A group that is behind by less is not: launching takes as long, or another process had the core.
NOISE_S = {"cuda": 1e-4, "cpu": 2e-2}


@dataclass(frozen=True)
class Row:
    """One collective of one group: the median of each round, on the group's first rank. Ranks are the world's."""

    layout: str
    axis: str
    ranks: list[int]
    collective: str
    size: int  # bytes: of the buffer that is reduced, gathered into, scattered or exchanged
    seconds: list[float]

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes per second."""
        return self.size / median(self.seconds)

    @property
    def bus_bandwidth(self) -> float:
        """What each rank's link carried, whatever the group's size (PERFORMANCE.md of NVIDIA/nccl-tests)."""
        p = len(self.ranks)
        factor = {"all-reduce": 2 * (p - 1) / p, "send": 1.0}.get(self.collective, (p - 1) / p)
        return self.algorithm_bandwidth * factor


def all_reduce(group: Group, x: Tensor) -> None:
    dist.all_reduce(x, group=group.handle)


def all_gather(group: Group, x: Tensor) -> None:
    group.all_gather(x[: len(x) // group.size], 0)


def reduce_scatter(group: Group, x: Tensor) -> None:
    group.reduce_scatter(x, 0)


def all_to_all(group: Group, x: Tensor) -> None:
    group.all_to_all(x)


def send(group: Group, x: Tensor) -> None:
    """To the next rank, while the one before sends."""
    out = torch.empty_like(x)
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for work in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group=group.handle, group_peer=following),
            dist.P2POp(dist.irecv, out, group=group.handle, group_peer=before),
        ]
    ):
        work.wait()


COLLECTIVES: dict[str, Callable[[Group, Tensor], None]] = {
    "all-reduce": all_reduce,
    "all-gather": all_gather,
    "reduce-scatter": reduce_scatter,
    "all-to-all": all_to_all,
    "send": send,
}


def sizes(station: Station) -> list[int]:
    """Bytes of the messages, the short one first."""
    largest = station.settings.largest_message or (256 * MIB if station.on_gpu else 4 * MIB)
    middle = [16 * MIB] if station.on_gpu and largest > 16 * MIB and not station.settings.quick else []
    return [SHORT, *middle, largest]


def seconds_of(station: Station, work: Callable[[], None], size: int) -> list[float]:
    """Of one call, a median for each round."""
    calls = 10 if size == SHORT else 1
    work()
    rounds = []
    for _ in range(station.settings.rounds):
        seconds = []
        for _ in range(station.settings.repeats):
            station.synchronise()
            begin = time.perf_counter()
            for _ in range(calls):
                work()
            station.synchronise()
            seconds.append((time.perf_counter() - begin) / calls)
        rounds.append(median(seconds))
    return rounds


def spacing(layout: Layout, axis: str) -> tuple[int, ...]:
    """The ranks of rank 0's group, which tell how the axis' others lie. Axes with equal ones have the same groups.

    >>> spacing(Layout(pp=2, edp=1, ep=2, tp=1), "ep"), spacing(Layout(pp=1, edp=2, ep=1, tp=2), "tp")
    ((0, 1), (0, 1))
    """
    return tuple(layout.members(UNIONS.get(axis, (axis,)), 0))


def measure(station: Station) -> list[dict[str, Any]]:
    rows, measured = [], set()
    for name, layout, _ in station.layouts():
        for axis in GROUPS:
            group = station.grid(layout)[axis]
            if group.size == 1 or spacing(layout, axis) in measured:
                continue
            measured.add(spacing(layout, axis))
            ranks = dist.get_process_group_ranks(group.handle)
            for collective, call in COLLECTIVES.items():
                for size in sizes(station):
                    station.mark(f"{collective} of {size} bytes of {axis} in {name}")
                    numbers = max(1, size // 4 // group.size) * group.size
                    x = torch.zeros(numbers, device=station.process.device)
                    seconds = seconds_of(station, lambda: call(group, x), size)  # noqa: B023 (called at once)
                    if group.rank == 0:
                        rows.append(asdict(Row(name, axis, ranks, collective, 4 * numbers, seconds)))
    return rows


def judge(station: Station, found: list[Any]) -> Verdict:
    rows = [Row(**row) for one in found for row in one]
    alike: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.layout, row.axis, row.collective, row.size), []).append(row)
    if not rows:
        return Verdict("one process: nothing to send", skipped=True)
    least = NOISE_S[station.process.device.type]
    verdict = Verdict(f"{len(rows)} times, of {len({tuple(row.ranks) for row in rows})} groups")
    for peers in alike.values():
        usual = [median_low(times) for times in zip(*(row.seconds for row in peers), strict=True)]
        for row in peers:
            factor = min(mine / theirs for mine, theirs in zip(row.seconds, usual, strict=True))
            if factor > station.settings.group_factor and median(row.seconds) - median(usual) > least:
                verdict.faults.append(
                    f"{row.collective} of {row.axis} in {row.layout}, {shown(row.size)}: the group of "
                    f"{station.names(row.ranks)} took {median(row.seconds) * 1e3:.2f} ms, at least {factor:.1f} times "
                    f"the median of the axis' {len(peers)} groups in each round"
                )
    verdict.table = table(alike) + repeated(station)
    verdict.figures = [
        asdict(row) | {kind: getattr(row, kind) for kind in ("algorithm_bandwidth", "bus_bandwidth")} for row in rows
    ]
    return verdict


def repeated(station: Station) -> list[str]:
    """Which axes have the groups of another one, and were not measured again."""
    first: dict[tuple[int, ...], str] = {}
    also: dict[str, list[str]] = {}
    for name, layout, _ in station.layouts():
        for axis in GROUPS:
            which = spacing(layout, axis)
            here = f"{axis} of {name}"
            if len(which) > 1 and first.setdefault(which, here) != here:
                also.setdefault(first[which], []).append(here)
    return [f"the same groups as {where}: {'; '.join(others)}" for where, others in also.items()]


def shown(size: int) -> str:
    """
    >>> shown(1024), shown(4 * 2**20), shown(4194300)
    ('1 KiB', '4 MiB', '4 MiB')
    """
    return f"{size / MIB:.0f} MiB" if size > MIB / 2 else f"{size / KIB:.0f} KiB"


def table(alike: dict[tuple[str, str, str, int], list[Row]]) -> list[str]:
    """A line for each axis and collective; GB are 1e9 bytes, and each number is the median of the axis' groups."""
    lines, layout_before = [], None
    titles = f"{'size':>8s} {'ms':>9s} {'alg GB/s':>9s} {'bus GB/s':>9s}"
    head = f"{'groups':>6s} x {'ranks':<5s} {'collective':<15s} {titles}"
    for (layout, axis, collective, size), rows in alike.items():
        if layout != layout_before:
            lines += [layout, f"  {'axis':<6s} {head}"]
            layout_before = layout
        ms = median(median(row.seconds) for row in rows) * 1e3
        speeds = [median(getattr(row, kind) for row in rows) / 1e9 for kind in ("algorithm_bandwidth", "bus_bandwidth")]
        lines.append(
            f"  {axis:<6s} {len(rows):>6d} x {len(rows[0].ranks):<5d} {collective:<15s} {shown(size):>8s} {ms:9.3f} "
            + " ".join(f"{speed:9.3f}" for speed in speeds)
        )
    return lines
