"""Ranks that agree on what they found, so that none waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

Found = TypeVar("Found")


def of_main(find: Callable[[], Found]) -> Found:
    """What `find` gives on rank 0, on every rank, or the ValueError that it raises there. Collective.

    Others may see a folder later, or not at all, and would go another way.
    """
    found: list[Any] = [None, None]  # the answer, or the fault
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except ValueError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def gathered(own: Found, group: dist.ProcessGroup | None = None) -> list[Found]:
    """What every rank of a group (default: all) brings, by rank. Collective; for small things that are rare."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


@contextmanager
def together() -> Iterator[None]:
    """A block, without collectives of its own, that all ranks leave as the first of them that raises a ValueError.

    Collective at its end.
    """
    fault = None
    try:
        yield
    except ValueError as error:
        fault = str(error)
    first = next((message for message in gathered(fault) if message is not None), None)
    if first is not None:
        raise ValueError(first)


def brought_to_main(own: Found) -> list[Found]:
    """What every rank brings, by rank, on rank 0; nothing on the others. Collective; for what is too large for all."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, found, dst=0)
    return found or []
