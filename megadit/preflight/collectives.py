"""Every collective of every group brings each rank what it should, from whom it should.

Each number says who wrote it, for whom, and at which place, so that a wrong one tells whose block it is in. A sum
cannot tell that; so each rank adds its block in a row of its own, where the others add zeros, and all add to one more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadit.parallel.grid import Group
from megadit.preflight.station import GROUPS, Station
from megadit.preflight.verdict import Verdict

PLACES = 5  # numbers in a block
MOST_FAULTS = 8  # that one rank reports
MOST_SHOWN = 20
MOST_SOURCES = 8  # that broadcast in turn
EVERYONE = -1  # whose block: the row that all add to


@dataclass(frozen=True)
class Wrong:
    """One block that is not what its sender sent, as one rank has it. Ranks are those of the world."""

    layout: str
    axis: str
    collective: str
    receiver: int
    sender: int
    expected: list[float]
    found: list[float]


@dataclass(frozen=True)
class Wire:
    """A group during the check: coded blocks, and where they should be."""

    group: Group
    ranks: list[int]  # of the world, by rank in the group
    device: torch.device

    def block(self, sender: int, receiver: int) -> Tensor:
        """What one rank of the group writes for another; sums are exact in float64 up to 10,000 ranks."""
        code = self.ranks[sender] * 100_000 + self.ranks[receiver]
        return code * 100.0 + torch.arange(1, PLACES + 1, dtype=torch.float64, device=self.device)

    def blocks(self, pairs: list[tuple[int, int]]) -> Tensor:
        return torch.stack([self.block(*pair) for pair in pairs]) if pairs else self.nothing(0)

    def nothing(self, rows: int) -> Tensor:
        return torch.zeros(rows, PLACES, dtype=torch.float64, device=self.device)

    def addend(self, sender: int, receiver: int) -> Tensor:
        """[size + 1, PLACES]: the sender's own row, and the last one."""
        rows = self.nothing(self.group.size + 1)
        rows[sender] = rows[-1] = self.block(sender, receiver)
        return rows

    def total(self, receiver: int) -> Tensor:
        """The sum of all ranks' addends."""
        own = self.blocks([(sender, receiver) for sender in range(self.group.size)])
        return torch.cat([own, own.sum(0, keepdim=True)])


Found = tuple[str, list[int], Tensor, Tensor]  # collective, sender of each row, rows as they came, as they should be


def sums(wire: Wire) -> Iterator[Found]:
    group, size = wire.group, wire.group.size
    senders = [*range(size), EVERYONE]
    yield "all-reduce", senders, group.all_reduce(wire.addend(group.rank, 0)), wire.total(0)
    for_all = torch.cat([wire.addend(group.rank, receiver) for receiver in range(size)])
    yield "reduce-scatter", senders, group.reduce_scatter(for_all, 0), wire.total(group.rank)
    highest = wire.block(group.rank, 0)[None].clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group.handle)
    top = max(range(size), key=lambda rank: wire.ranks[rank])
    yield "all-reduce of the maximum", [top], highest, wire.block(top, 0)[None]


def gathers(wire: Wire) -> Iterator[Found]:
    group, senders = wire.group, list(range(wire.group.size))
    mine, all_of_them = wire.block(group.rank, 0)[None], wire.blocks([(sender, 0) for sender in senders])
    yield "all-gather", senders, group.all_gather(mine, 0), all_of_them
    beside = group.all_gather(mine, 1).view(group.size, PLACES)
    yield "all-gather along the last dimension", senders, beside, all_of_them
    pieces = [torch.empty_like(mine) for _ in senders]
    dist.all_gather(pieces, mine, group=group.handle)
    yield "all-gather into a list", senders, torch.cat(pieces), all_of_them
    for source in dict.fromkeys([*senders[: MOST_SOURCES - 1], senders[-1]]):
        here = wire.block(source, 0)[None].clone() if group.rank == source else wire.nothing(1)
        dist.broadcast(here, group=group.handle, group_src=source)
        yield "broadcast", [source], here, wire.block(source, 0)[None]


def rows_between(sender: int, receiver: int) -> int:
    """Of the ragged exchange: none, one or two."""
    return (sender + 2 * receiver) % 3


def exchanges(wire: Wire) -> Iterator[Found]:
    group, senders = wire.group, list(range(wire.group.size))
    outgoing = wire.blocks([(group.rank, receiver) for receiver in senders])
    expected = wire.blocks([(sender, group.rank) for sender in senders])
    yield "all-to-all", senders, group.all_to_all(outgoing), expected
    # As the dispatch of tokens has it: a transposed view goes in.
    yield "all-to-all of a view", senders, group.all_to_all(outgoing.t().contiguous().t()), expected
    sent = [rows_between(group.rank, receiver) for receiver in senders]
    received = [rows_between(sender, group.rank) for sender in senders]
    ragged = wire.blocks([(group.rank, receiver) for receiver in senders for _ in range(sent[receiver])])
    come_from = [sender for sender in senders for _ in range(received[sender])]
    arrived = group.all_to_all_ragged(ragged, sent, received)
    yield "ragged all-to-all", come_from, arrived, wire.blocks([(sender, group.rank) for sender in come_from])


def hops(wire: Wire) -> Iterator[Found]:
    """To the next and the one before at once, as a pipeline does; then one after the other, in a chain."""
    group, size = wire.group, wire.group.size
    following, before = (group.rank + 1) % size, (group.rank - 1) % size
    from_before, from_following = wire.nothing(1), wire.nothing(1)
    up, down = wire.block(group.rank, following)[None], wire.block(group.rank, before)[None]
    # In a group of two both neighbours are one rank: the tag tells what goes up from what goes down.
    operations = [
        dist.P2POp(dist.isend, up, group=group.handle, group_peer=following, tag=1),
        dist.P2POp(dist.irecv, from_before, group=group.handle, group_peer=before, tag=1),
        dist.P2POp(dist.isend, down, group=group.handle, group_peer=before, tag=2),
        dist.P2POp(dist.irecv, from_following, group=group.handle, group_peer=following, tag=2),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    yield "send to the next rank", [before], from_before, wire.block(before, group.rank)[None]
    yield "send to the rank before", [following], from_following, wire.block(following, group.rank)[None]
    passed = wire.nothing(1)
    if group.rank > 0:
        dist.recv(passed, group=group.handle, group_src=group.rank - 1)
        yield "receive in a chain", [before], passed, wire.block(before, group.rank)[None]
    if group.rank + 1 < size:
        dist.send(up, group=group.handle, group_dst=group.rank + 1)


KINDS: tuple[Callable[[Wire], Iterator[Found]], ...] = (sums, gathers, exchanges, hops)


def measure(station: Station) -> dict[str, Any]:
    wrong: list[Wrong] = []
    tried = 0
    for name, layout, _ in station.layouts():
        for axis in GROUPS:
            group = station.grid(layout)[axis]
            if group.size == 1:
                continue
            wire = Wire(group, dist.get_process_group_ranks(group.handle), station.process.device)
            for kind in KINDS:
                station.mark(f"{kind.__name__} of {axis} in {name}")
                for collective, senders, found, expected in kind(wire):
                    wrong += compare(wire, (name, axis, collective), senders, found, expected)
                    tried += 1
    return {"tried": tried, "wrong": [asdict(each) for each in wrong[:MOST_FAULTS]], "count": len(wrong)}


def compare(wire: Wire, what: tuple[str, str, str], senders: list[int], found: Tensor, expected: Tensor) -> list[Wrong]:
    """The blocks that differ."""
    receiver = wire.ranks[wire.group.rank]
    rows = (found != expected).flatten(1).any(1).tolist() if len(senders) else []  # host sync
    return [
        Wrong(*what, receiver, EVERYONE if sender == EVERYONE else wire.ranks[sender], theirs.tolist(), mine.tolist())
        for sender, is_wrong, mine, theirs in zip(senders, rows, found, expected, strict=True)
        if is_wrong
    ]


def tell(value: float, ranks: int) -> str:
    """What a wrong number is.

    >>> tell(300_001_02.0, 4), tell(0.0, 4), tell(0.5, 4)
    ('what rank 3 wrote for rank 1', 'nothing', 'no number that a rank wrote')
    """
    code, place = divmod(value, 100)
    sender, receiver = divmod(code, 100_000)
    if value == 0:
        return "nothing"
    if value == int(value) and 1 <= place <= PLACES and sender < ranks and receiver < ranks:
        return f"what rank {sender:.0f} wrote for rank {receiver:.0f}"
    return "no number that a rank wrote"


def judge(station: Station, found: list[Any]) -> Verdict:
    wrong = [Wrong(**each) for one in found for each in one["wrong"]]
    count = sum(one["count"] for one in found)
    verdict = Verdict(f"{found[0]['tried']} on each rank", figures=[asdict(each) for each in wrong])
    senders = Counter(each.sender for each in wrong if each.sender != EVERYONE)
    if senders:
        culprit, blocks = senders.most_common(1)[0]
        verdict.faults.append(
            f"{station.names([culprit])} wrote {blocks} of the {senders.total()} wrong blocks that are shown"
        )
    for each in wrong[:MOST_SHOWN]:
        place = next(i for i, (a, b) in enumerate(zip(each.expected, each.found, strict=True)) if a != b)
        sender = "the sum of all blocks" if each.sender == EVERYONE else f"the block of {station.names([each.sender])}"
        what = f"{each.found[place]:.0f} ({tell(each.found[place], len(found))}), not {each.expected[place]:.0f}"
        verdict.faults.append(
            f"{each.collective} of {each.axis} in {each.layout}: {station.names([each.receiver])} has {sender} wrong: "
            f"at place {place} {what}"
        )
    if count > MOST_SHOWN:
        verdict.faults.append(f"and {count - MOST_SHOWN} blocks more")
    return verdict
