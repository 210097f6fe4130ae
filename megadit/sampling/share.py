"""Which pictures each data-parallel rank draws: calls of the network, as many and as large on every rank.

An expert group spans data-parallel ranks, so a rank that has nothing left to draw takes part in the call all the same,
with pictures that are thrown away. Groups of images that are routed together are never cut.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One call of the network on each of `ranks` data-parallel ranks.

    first: the index of rank 0's first picture; size: pictures that every rank draws, whole routing groups; count: of
    all pictures there are, so that indices from there on are filling.
    """

    first: int
    size: int
    ranks: int
    count: int

    @property
    def pictures(self) -> range:
        """What all ranks draw together.

        >>> Round(first=8, size=2, ranks=4, count=13).pictures
        range(8, 13)
        """
        return range(self.first, min(self.first + self.ranks * self.size, self.count))

    def drawn(self, rank: int) -> range:
        """What a rank draws, filling and all.

        >>> [Round(first=8, size=2, ranks=4, count=13).drawn(rank) for rank in range(4)]
        [range(8, 10), range(10, 12), range(12, 14), range(14, 16)]
        """
        begin = self.first + rank * self.size
        return range(begin, begin + self.size)

    def kept(self, rank: int) -> range:
        """What a rank draws that is no filling: the first of `drawn`, or none.

        >>> [len(Round(first=8, size=2, ranks=4, count=13).kept(rank)) for rank in range(4)]
        [2, 2, 1, 0]
        """
        drawn = self.drawn(rank)
        return range(min(drawn.start, self.count), min(drawn.stop, self.count))


def rounds_of(count: int, group: int, ranks: int, batch: int) -> list[Round]:
    """The rounds in which `ranks` data-parallel ranks draw `count` pictures, of which `group` are routed together.

    A call has at most `batch` pictures on each rank, rounded down to whole groups, but at least one group. It has fewer
    where that is enough for what is left.

    >>> [(round.pictures, round.size) for round in rounds_of(count=21, group=2, ranks=2, batch=5)]
    [(range(0, 8), 4), (range(8, 16), 4), (range(16, 21), 4)]
    >>> [(round.pictures, round.size) for round in rounds_of(count=5, group=1, ranks=4, batch=16)]
    [(range(0, 5), 2)]
    """
    largest, left = max(1, batch // group), -(-count // group)  # in groups
    rounds: list[Round] = []
    while left > 0:
        groups = min(largest, -(-left // ranks))
        done = rounds[-1].first + rounds[-1].size * ranks if rounds else 0
        rounds.append(Round(done, groups * group, ranks, count))
        left -= groups * ranks
    return rounds
