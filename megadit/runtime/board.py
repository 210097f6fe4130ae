"""Where the ranks leave word for one another: heartbeats, a verdict, and what each was doing when it fell.

It lies in the store that the processes met in, over a connection of its own. Every second a rank writes one key and
asks for two; rank 0 alone reads everyone's heartbeat, in one call.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Beat:
    """One heartbeat. Seconds are of the sender's clock; host, pid: where it lives."""

    count: int
    host: str
    pid: int
    step: int  # the last one that was done
    doing: str  # "training", "saving", ...
    idle: float  # seconds since there was progress
    limit: float  # that it may be idle
    complaint: str = ""  # the exception by which a collective said that a peer vanished
    complained: float = 0.0  # seconds ago
    left: bool = False  # it is done, and well

    @property
    def is_late(self) -> bool:
        return not self.left and self.idle > self.limit


@dataclass(frozen=True)
class Verdict:
    """Why everyone ends. kind: gone, hung or raised; ranks: to blame (for hung not known yet); by: who found it."""

    kind: str
    ranks: tuple[int, ...]
    by: int
    words: str
    folder: str  # the dumps' folder, below the run's "faults"


@dataclass
class Watched:
    """When each rank's heartbeat last changed, on the clock of who looks: clocks of two hosts are not compared."""

    beats: dict[int, Beat] = field(default_factory=dict)
    changed: dict[int, float] = field(default_factory=dict)

    def update(self, beats: dict[int, Beat], now: float) -> None:
        for rank, beat in beats.items():
            before = self.beats.get(rank)
            if before is None or before.count != beat.count:
                self.changed[rank] = now
            self.beats[rank] = beat

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks whose heart has not beaten for so long, and that did not leave."""
        return sorted(
            rank for rank, since in self.changed.items() if now - since > seconds and not self.beats[rank].left
        )


def where(rank: int, beat: Beat | None) -> str:
    """The rank, its host and process, and how that is when it is on this host: rank 1 (gpu07, process 321: stopped)."""
    if beat is None:
        return f"rank {rank}"
    state = _state_of(beat.pid) if beat.host == socket.gethostname() else ""
    return f"rank {rank} ({beat.host}, process {beat.pid}{': ' + state if state else ''})"


def _state_of(pid: int) -> str:
    """stopped, dead, or nothing to say; Linux."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "dead" if os.path.exists("/proc/self/stat") else ""
    return {"T": "stopped", "t": "stopped", "Z": "dead", "X": "dead"}.get(letter, "")


class Board:
    """The store's keys. Any call may hang as long as the store's server does."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = dist.PrefixStore("watchdog", store)
        self.rank, self.world_size = rank, world_size
        self._keys = [f"beat/{rank}" for rank in range(world_size)]
        self._complete = False  # everyone has left a first heartbeat

    def meet(self, token: str, beat: Beat) -> tuple[str, Beat]:
        """(rank 0's `token`, its first heartbeat), on all ranks. Waits for rank 0."""
        if self.rank == 0:
            self._store.set("main", json.dumps([token, asdict(beat)]))
        token, main = json.loads(self._store.get("main"))
        return token, Beat(**main)

    def beat(self, beat: Beat) -> None:
        self._store.set(self._keys[self.rank], json.dumps(asdict(beat)))

    def beats(self, ranks: Sequence[int] | None = None) -> dict[int, Beat]:
        """The last heartbeat of these ranks, or of all; nothing before all of them had one."""
        keys = self._keys if ranks is None else [self._keys[rank] for rank in ranks]
        if not self._complete:
            if not self._store.check(keys):
                return {}
            self._complete = ranks is None
        found = self._store.multi_get(keys)
        return dict(zip(range(self.world_size) if ranks is None else ranks, map(_beat, found), strict=True))

    def some_beats(self) -> dict[int, Beat]:
        """The last heartbeat of whoever had one. A call for each rank, for the end only."""
        present = [rank for rank, key in enumerate(self._keys) if self._store.check([key])]
        return self.beats(present) if present else {}

    def propose(self, verdict: Verdict) -> None:
        """Ask for the end. The first rank to do so wins."""
        self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))

    def verdict(self) -> Verdict | None:
        if not self._store.check(["verdict"]):
            return None
        plain = json.loads(self._store.get("verdict"))
        return Verdict(**{**plain, "ranks": tuple(plain["ranks"])})

    def report(self, sight: dict[str, Any]) -> None:
        """Leave word of what this rank was doing."""
        self._store.set(f"sight/{self.rank}", json.dumps(sight))
        self._store.add("sights", 1)

    def reported(self) -> int:
        return self._store.add("sights", 0)

    def reports(self) -> dict[int, dict[str, Any]]:
        """What the ranks said. A call for each rank, for the end only."""
        keys = {rank: f"sight/{rank}" for rank in range(self.world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def finish(self, summary: str) -> None:
        self._store.set("summary", summary)

    def summary(self) -> str | None:
        return self._store.get("summary").decode() if self._store.check(["summary"]) else None

    def leave(self) -> None:
        self._store.add("left", 1)

    def all_left(self) -> bool:
        return self._store.add("left", 0) >= self.world_size


def _beat(content: bytes) -> Beat:
    return Beat(**json.loads(content))
