"""Pipeline hops while all-to-alls are under way: two groups at once, begun in another order on every other stage.

A pipeline's stages are at different points of the step, so one sends activations while its neighbour's experts exchange
tokens. Where the two wait for one another, a training hangs (laekov/fastmoe, issue 58).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadit.parallel.grid import Group
from megadit.preflight.station import Station
from megadit.preflight.verdict import Verdict

ROUNDS, QUICK_ROUNDS = 20, 6
NUMBERS = 2**16  # float32 in one message

Wait = Callable[[], None]


class Exchange:
    """One direction of traffic under way: `buffers` are kept until it is done, and tell what came."""

    def __init__(self, works: list[Any], arrived: list[tuple[Tensor, float]], kept: list[Tensor]) -> None:
        self._works, self._arrived, self._kept = works, arrived, kept

    def wrong(self) -> list[float]:
        """Wait; (expected) values of what came otherwise."""
        for work in self._works:
            work.wait()
        return [value for tensor, value in self._arrived if not bool((tensor == value).all())]  # host sync


def code(turn: int, sender: int, receiver: int) -> float:
    """Exact in float32 for worlds of a few hundred ranks: what a message carries, in every number."""
    return float((sender * 251 + receiver * 7 + turn) % 2**20 + 1)


def start_hops(group: Group, ranks: list[int], turn: int, device: torch.device) -> Exchange:
    """Forward to the next stage and backward to the one before, of those that there are."""
    operations, arrived, kept = [], [], []
    for step in (1, -1):
        there, here = group.rank + step, group.rank - step
        if 0 <= there < group.size:
            x = torch.full((NUMBERS,), code(turn, ranks[group.rank], ranks[there]), device=device)
            operations.append(dist.P2POp(dist.isend, x, group=group.handle, group_peer=there))
            kept.append(x)
        if 0 <= here < group.size:
            y = torch.zeros(NUMBERS, device=device)
            operations.append(dist.P2POp(dist.irecv, y, group=group.handle, group_peer=here))
            arrived.append((y, code(turn, ranks[here], ranks[group.rank])))
    return Exchange(dist.batch_isend_irecv(operations), arrived, kept)


def start_all_to_all(group: Group, ranks: list[int], turn: int, device: torch.device) -> Exchange:
    each = NUMBERS // group.size
    x = torch.cat([torch.full((each,), code(turn, ranks[group.rank], other), device=device) for other in ranks])
    y = torch.zeros_like(x)
    work = dist.all_to_all_single(y, x, group=group.handle, async_op=True)
    arrived = [(part, code(turn, other, ranks[group.rank])) for part, other in zip(y.split(each), ranks, strict=True)]
    return Exchange([work], arrived, [x])


def measure(station: Station) -> dict[str, Any]:
    tried, wrong = 0, []
    turns = QUICK_ROUNDS if station.settings.quick else ROUNDS
    for name, layout, _ in station.layouts():
        if layout.pp == 1 or layout.ep == 1:
            continue
        grid, device = station.grid(layout), station.process.device
        pp, ep = grid["pp"], grid["ep"]
        pipeline, experts = (dist.get_process_group_ranks(group.handle) for group in (pp, ep))
        for turn in range(turns):
            station.mark(f"round {turn + 1} of hops and all-to-alls in {name}")
            starts = [("hop", start_hops, pp, pipeline), ("all-to-all", start_all_to_all, ep, experts)]
            if (pp.rank + turn) % 2:
                starts.reverse()
            # Two of each under way, and what began last is waited for first.
            exchanges = [
                (kind, start(group, ranks, 2 * turn + again, device))
                for again in range(2)
                for kind, start, group, ranks in starts
            ]
            for kind, exchange in reversed(exchanges):
                here = {"layout": name, "kind": kind, "round": turn + 1}
                wrong += [here | {"expected": value} for value in exchange.wrong()]
            tried += 1
    return {"tried": tried, "wrong": wrong}


def judge(station: Station, found: list[Any]) -> Verdict:
    if not found[0]["tried"]:
        return Verdict("no layout has pipeline and expert parallelism; give one with --layout", skipped=True)
    verdict = Verdict(f"{found[0]['tried']} rounds, two of each under way")
    for rank, one in enumerate(found):
        kinds = {(each["kind"], each["layout"]): each["round"] for each in reversed(one["wrong"])}
        verdict.faults += [
            f"{station.names([rank])} received wrong numbers in the {kind}s of {layout}, first in round {first}"
            for (kind, layout), first in kinds.items()
        ]
    verdict.figures = found
    return verdict
