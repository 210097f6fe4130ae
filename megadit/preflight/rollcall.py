"""Who has come to the end of a check: over the store of the process group, so that no rank waits for a lost one.

    every rank   bring(topic, what it found)
    rank 0       gather(topic) until all have, or time is up; then tell(topic, how to go on)
    the others   hear(topic)

Rank 0 alone reads what all brought: a check costs as many look-ups as there are ranks, not their square.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

POLL_S = 0.02


class Silence(RuntimeError):
    """Rank 0 does not answer."""


class RollCall:
    """Plain data as JSON, under a topic of the store."""

    def __init__(self, rank: int, world_size: int, prefix: str = "preflight") -> None:
        self.rank, self.world_size = rank, world_size
        # A client of its own: one that a hanging check waits with would let nobody else in.
        world = dist.group.WORLD
        assert world is not None
        self.store = dist.PrefixStore(prefix, world.get_group_store().clone())  # type: ignore[attr-defined]

    def bring(self, topic: str, value: Any, alarming: bool = False) -> None:
        """This rank's answer; an alarming one makes the others wait no longer than they must."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if alarming:
            self.store.add(f"{topic}/alarms", 1)
        self.store.add(f"{topic}/count", 1)

    def is_alarmed(self, topic: str) -> bool:
        """Whether a rank brought something alarming."""
        return self.store.add(f"{topic}/alarms", 0) > 0

    def gather(self, topic: str, deadline: float) -> dict[int, Any]:
        """What each rank brought until all did, or until `deadline` on the monotonic clock. For rank 0."""
        while self.store.add(f"{topic}/count", 0) < self.world_size and time.monotonic() < deadline:
            time.sleep(POLL_S)
        come = [rank for rank in range(self.world_size) if self.store.check([f"{topic}/{rank}"])]
        return {rank: json.loads(self.store.get(f"{topic}/{rank}")) for rank in come}

    def dismiss(self, seconds: float) -> None:
        """Wait until rank 0 is done too: launchers end everyone when the first process exits. Raises Silence."""
        if self.rank == 0:
            self.tell("end", True)
        else:
            self.hear("end", seconds)

    def tell(self, topic: str, value: Any) -> None:
        """Rank 0's word to all."""
        self.store.set(f"{topic}/word", json.dumps(value))

    def hear(self, topic: str, seconds: float) -> Any:
        """Rank 0's word. Raises Silence when it does not come in so many seconds."""
        try:
            self.store.wait([f"{topic}/word"], timedelta(seconds=seconds))
        except (dist.DistStoreError, RuntimeError) as error:
            raise Silence(f"rank 0 said nothing about {topic} in {seconds:.0f} s") from error
        return json.loads(self.store.get(f"{topic}/word"))
