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
LEAVING_S = 2.0  # that rank 0 waits for the others at the end


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

    def gather(self, topic: str, deadline: float, alarmed_s: float | None = None) -> dict[int, Any]:
        """What each rank brought until all did, or until `deadline` on the monotonic clock; for rank 0.

        With `alarmed_s`, no longer than so many seconds after an alarm.
        """
        while self.store.add(f"{topic}/count", 0) < self.world_size and time.monotonic() < deadline:
            if alarmed_s is not None and self.is_alarmed(topic):
                deadline, alarmed_s = min(deadline, time.monotonic() + alarmed_s), None
            time.sleep(POLL_S)
        come = [rank for rank in range(self.world_size) if self.store.check([f"{topic}/{rank}"])]
        return {rank: json.loads(self.store.get(f"{topic}/{rank}")) for rank in come}

    def dismiss(self, seconds: float) -> None:
        """Leave together. Raises Silence.

        Launchers end everyone when the first process exits, so the others wait for rank 0; and rank 0, which may serve
        the store, for those that can still hear it.
        """
        if self.rank:
            self.hear("end", seconds)
            self.bring("end", True)
        else:
            self.tell("end", True)
            self.bring("end", True)
            self.gather("end", time.monotonic() + LEAVING_S)

    def tell(self, topic: str, value: Any) -> None:
        """Rank 0's word to all."""
        self.store.set(f"{topic}/word", json.dumps(value))

    def hear(self, topic: str, seconds: float) -> Any:
        """Rank 0's word. Raises Silence when it does not come in so many seconds."""
        try:
            self.store.wait([f"{topic}/word"], timedelta(seconds=seconds))
            return json.loads(self.store.get(f"{topic}/word"))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise Silence(f"rank 0 said nothing about {topic} in {seconds:.0f} s, or is gone: {error}") from error
