"""A rank during the checks: who it is, what it was asked for, its groups, and what it is doing."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megadit.parallel.grid import Grid
from megadit.parallel.layout import Layout, ParallelConfig
from megadit.preflight.layouts import label
from megadit.runtime.launch import Process

GROUPS = ("tp", "pp", "ep", "edp", "dp", "world")


@dataclass(frozen=True)
class Member:
    """A rank as a report names it."""

    rank: int
    host: str
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, {self.device})"


@dataclass(frozen=True)
class Settings:
    """What is tried, and what is too much. Sizes are in bytes; 0: by the device."""

    layouts: tuple[ParallelConfig, ...]
    limit_s: float = 180.0  # of one check
    slow_factor: float = 1.5  # of a rank's time over the ranks' median
    group_factor: float = 3.0  # of a group's time over the median of its axis
    memory_factor: float = 0.8  # of a rank's free memory over the ranks' median
    max_skew_s: float = 1.0
    memory_test: int = 0
    largest_message: int = 0
    quick: bool = False

    @property
    def rounds(self) -> int:
        """Who is slow must be so in each of these: something else may have run for a moment."""
        return 2 if self.quick else 3

    @property
    def repeats(self) -> int:
        """A round's time is the median of so many."""
        return 3 if self.quick else 5

    @property
    def steps(self) -> int:
        """Of a training."""
        return 2 if self.quick else 3


@dataclass
class Station:
    """This rank during the checks. `doing` is for the report of a hang; `marks` counts how often it changed."""

    process: Process
    settings: Settings
    members: list[Member] = field(default_factory=list)
    grids: dict[Layout, Grid] = field(default_factory=dict)
    doing: str = "starting"
    marks: int = 0

    @property
    def me(self) -> Member:
        return Member(self.process.rank, socket.gethostname(), str(self.process.device))

    @property
    def on_gpu(self) -> bool:
        return self.process.device.type == "cuda"

    def mark(self, doing: str) -> None:
        """Say what comes next; every rank says the same in the same order."""
        self.doing, self.marks = doing, self.marks + 1

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.process.device)

    def layouts(self) -> Iterator[tuple[str, Layout, ParallelConfig]]:
        """(what it is called, the ranks, the degrees) of each."""
        for config in self.settings.layouts:
            yield label(config, self.process.world_size), Layout.of(config, self.process.world_size), config

    def grid(self, layout: Layout) -> Grid:
        """The layout's groups, created once. Collective."""
        if layout not in self.grids:
            self.grids[layout] = Grid(layout, self.process.rank)
        return self.grids[layout]

    def hosts(self) -> dict[str, list[int]]:
        """The ranks of each host."""
        found: dict[str, list[int]] = {}
        for member in self.members:
            found.setdefault(member.host, []).append(member.rank)
        return found

    def names(self, ranks: Iterable[int]) -> str:
        """Several ranks, for a message."""
        return name_ranks(self.members, sorted(ranks))


def name_ranks(members: Sequence[Member], ranks: Sequence[int], most: int = 8) -> str:
    """Each of a few ranks; of many, the first ones and how many more on how many hosts.

    >>> name_ranks([Member(0, "a", "cpu"), Member(1, "b", "cpu")], [0, 1])
    'rank 0 (a, cpu), rank 1 (b, cpu)'
    >>> name_ranks([Member(i, f"host{i // 2}", "cpu") for i in range(8)], range(8), most=1)
    'rank 0 (host0, cpu) and 7 more on 4 hosts'
    """
    known = {member.rank: member for member in members}
    shown = ", ".join(str(known.get(rank, f"rank {rank}")) for rank in ranks[:most])
    rest = [known[rank].host for rank in ranks[most:] if rank in known]
    return f"{shown} and {len(ranks) - most} more on {len(set(rest))} hosts" if len(ranks) > most else shown
