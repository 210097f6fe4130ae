"""Memory is there, as much on each rank as on the others, and keeps what is written to it."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from megadit.preflight.station import Station
from megadit.preflight.verdict import Verdict

WORDS = 2**24  # of 4 bytes, written at a time
MIB, GIB = 2**20, 2**30


def host_memory() -> tuple[int, int]:
    """(bytes that this machine, or the container's limit, still has; bytes in all)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, meminfo = total, Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdecimal():
        total, free = min(total, int(text)), min(free, int(text) - int(used.read_text()))
    return free, total


def fill(words: Tensor, first: int) -> None:
    """Give each word a value that tells its place, so that a word that ends up elsewhere shows."""
    places = torch.arange(first, first + len(words), dtype=torch.int64, device=words.device)
    words.copy_((places * 2654435761) & 0x7FFFFFFF)  # Knuth's multiplicative hash: neighbours differ in many bits


def differing(words: Tensor, first: int, flipped: bool) -> tuple[int, int]:
    """(words that are not what `fill` wrote, or its complement; the place of the first of them)."""
    expected = torch.empty_like(words)
    fill(expected, first)
    wrong = words != (~expected if flipped else expected)
    count = int(wrong.sum())  # host sync
    return count, first + int(wrong.to(torch.uint8).argmax()) if count else 0


def try_pattern(size: int, device: torch.device) -> dict[str, Any] | None:
    """Write so many bytes at once, read them, write their complements, read those. What was wrong, or None."""
    lengths = [min(WORDS, size // 4 - begin) for begin in range(0, size // 4, WORDS)]
    blocks = [torch.empty(length, dtype=torch.int32, device=device) for length in lengths]
    for i, block in enumerate(blocks):
        fill(block, i * WORDS)
    for flipped in (False, True):
        for i, block in enumerate(blocks):
            count, place = differing(block, i * WORDS, flipped)
            if count:
                return {"count": count, "byte": 4 * place, "pass": "complement" if flipped else "pattern"}
            block.bitwise_not_()
    return None


def measure(station: Station) -> dict[str, Any]:
    device = station.process.device
    free, total = torch.cuda.mem_get_info(device) if station.on_gpu else host_memory()
    size = station.settings.memory_test or (GIB if station.on_gpu else 32 * MIB)
    # On a CPU the ranks of a host write at the same time into the same memory.
    sharing = 1 if station.on_gpu else len(station.hosts()[station.members[station.process.rank].host])
    station.mark(f"writing {size / MIB:.0f} MiB")
    wrong = {"room": free / sharing} if size > 0.9 * free / sharing else try_pattern(size, device) or {}
    if station.on_gpu:
        torch.cuda.empty_cache()
    share = {"free": free / sharing, "total": total / sharing, "host_free": host_memory()[0]}
    return share | {"wrong": wrong, "size": size}


def judge(station: Station, found: list[Any]) -> Verdict:
    usual = median_low(each["free"] for each in found)
    size = found[0]["size"]
    verdict = Verdict(
        f"{usual / GIB:.1f} GiB free for each rank (median); {size / MIB:.0f} MiB written, read, inverted, read"
    )
    for rank, each in enumerate(found):
        who, wrong = station.names([rank]), each["wrong"]
        if "room" in wrong:
            room = f"{wrong['room'] / GIB:.2f} GiB"
            verdict.faults.append(f"{who} has {room}, too little to write {size / GIB:.2f} GiB to; see --memory-test")
        elif wrong:
            verdict.faults.append(
                f"{who} does not keep what is written: {wrong['count']} words differ, the first at byte "
                f"{wrong['byte']} (in the {wrong['pass']})"
            )
        if each["free"] < usual * station.settings.memory_factor:
            verdict.faults.append(
                f"{who} has {each['free'] / GIB:.1f} GiB free of {each['total'] / GIB:.1f}, the median is "
                f"{usual / GIB:.1f}: does something else run there?"
            )
    usual_host = median_low(each["host_free"] for each in found)
    for host, ranks in station.hosts().items():
        free = found[ranks[0]]["host_free"]
        if free < usual_host * station.settings.memory_factor:
            median = f"{usual_host / GIB:.1f} GiB"
            verdict.warnings.append(f"{host} has {free / GIB:.1f} GiB of host memory free, the median is {median}")
    verdict.figures = {"free_bytes": [each["free"] for each in found], "tested_bytes": size}
    return verdict
