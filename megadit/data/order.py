"""Which samples a step reads: a pure function of (seed, step), in constant memory for any number of samples.

Several data sets are mixed by weight. Samples of one size are a bucket, and a step reads one bucket, so that all ranks
compute on one shape. In numbers, for data set d, bucket b with n_db samples, and N samples in all:

1. A cycle is a run over about N samples. In each, bucket b gets s_db = N w_d n_db / n_d of them from data set d,
   rounded (n_db without weights). The s_b places of the bucket come in a keyed permutation, new in each cycle.
2. What d gives, cycle after cycle, are passes over its n_db samples, each in a keyed permutation of its own.
3. So a bucket is an endless row of samples, cut into batches. Cycle e has the batches that end in it, those up to
   floor((e + 1) s_b / G) at a global batch of G: no sample is lost, and what is left of a cycle begins the next.
4. The buckets' batches are mixed evenly: the m_b of a cycle fall into m_b equal intervals of it, each at a random time
   in its own. A bucket's batches stay in their order. Without weights a cycle is one pass, so that one of a bucket's
   passes ends before the next one begins; with weights a cycle may mix samples of several.

Permutations are generalised Feistel networks with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002): any place of any of them is computed by itself.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import isqrt

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_MOMENTS = 1 << 62  # of a cycle; a range of them has a length that Python can tell


def round_keys(seed: int, *names: str | int) -> np.ndarray:
    """The keys of a permutation, uint64: a function of (seed, names) alone."""
    digest = hashlib.blake2b(repr((int(seed), *names)).encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute(place_N: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """What a keyed permutation of 0 to `size` - 1 puts at these places; uint64.

    >>> permute(np.arange(10), 10, round_keys(0, "example")).tolist()
    [8, 3, 0, 6, 7, 2, 9, 1, 4, 5]
    >>> permute(np.array([3, 10**12 - 1]), 10**12, round_keys(0, "example")).tolist()
    [561775704976, 552031749682]
    """
    rows = isqrt(size - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)  # rows x columns has fewer than `rows` places too many
    found_N = np.asarray(place_N, np.uint64).copy()
    walking = np.arange(len(found_N))
    while len(walking):
        row, column = np.divmod(found_N[walking], np.uint64(columns))
        for number in range(0, _ROUNDS, 2):
            row = (row + _mixed(column + keys[number]) % np.uint64(rows)) % np.uint64(rows)
            column = (column + _mixed(row + keys[number + 1]) % np.uint64(columns)) % np.uint64(columns)
        found_N[walking] = row * np.uint64(columns) + column
        walking = walking[found_N[walking] >= size]
    return found_N


def _mixed(x_N: np.ndarray) -> np.ndarray:
    """splitmix64's last step, which spreads every bit over all."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def within(ends: np.ndarray, place_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts lie end to end, and end at `ends`: (the part that each place falls into, its place within that).

    >>> [each.tolist() for each in within(np.array([3, 3, 5]), np.array([0, 2, 3, 4]))]
    [[0, 0, 2, 2], [0, 2, 0, 1]]
    """
    part_N = np.searchsorted(ends, place_N, side="right")
    return part_N, place_N - np.where(part_N > 0, ends[part_N - 1], 0)


@dataclass(frozen=True)
class Share:
    """What a bucket has of one data set: `samples`, of which it shows `per_cycle`, more or fewer by weight."""

    dataset: int
    samples: int
    per_cycle: int


def shares(counts: Sequence[Mapping[str, int]], weights: Sequence[float] = ()) -> dict[str, tuple[Share, ...]]:
    """The shares of each bucket, from each data set's number of samples by bucket.

    weights: how often each data set is drawn, in any unit; none: every sample as often as any other. Every data set has
    samples; where rounding would leave none of a bucket, it shows one.

    >>> found = shares([{"a": 30, "b": 10}, {"a": 40}], weights=[3, 1])
    >>> found["a"]
    (Share(dataset=0, samples=30, per_cycle=45), Share(dataset=1, samples=40, per_cycle=20))
    >>> found["b"]
    (Share(dataset=0, samples=10, per_cycle=15),)
    """
    sizes = [sum(one.values()) for one in counts]
    exact = [Fraction(weight) for weight in weights or sizes]  # the same numbers on every machine
    found: dict[str, list[Share]] = {}
    for dataset, (one, size, weight) in enumerate(zip(counts, sizes, exact, strict=True)):
        for bucket, samples in one.items():
            if samples:
                per_cycle = round(Fraction(sum(sizes) * samples, size) * weight / sum(exact))
                found.setdefault(bucket, []).append(Share(dataset, samples, max(1, per_cycle)))
    return {bucket: tuple(found[bucket]) for bucket in sorted(found)}


@dataclass(frozen=True)
class Places:
    """Where a step's samples are: all in one bucket; sample `index_B` of that bucket in data set `dataset_B`. pass_B:
    how often the data set's bucket had been shown as a whole before.
    """

    bucket: str
    dataset_B: np.ndarray
    index_B: np.ndarray
    pass_B: np.ndarray


@dataclass(frozen=True)
class Order:
    """The order of a training's samples. shares: by bucket; each bucket shows at least one sample in a cycle."""

    seed: int
    global_batch: int
    shares: Mapping[str, tuple[Share, ...]]

    def per_cycle(self, bucket: str) -> int:
        """Samples of the bucket in a cycle."""
        return sum(share.per_cycle for share in self.shares[bucket])

    def batches_through(self, bucket: str, cycle: int) -> int:
        """The bucket's batches in all cycles up to this one."""
        return (cycle + 1) * self.per_cycle(bucket) // self.global_batch

    def steps_through(self, cycle: int) -> int:
        """The steps of all cycles up to this one."""
        return sum(self.batches_through(bucket, cycle) for bucket in self.shares)

    def cycle_of(self, step: int) -> int:
        """The cycle, from 0, that a step (from 1) is in."""
        total = sum(self.per_cycle(bucket) for bucket in self.shares)
        bound = (step + len(self.shares)) * self.global_batch // total + 1  # the step is in an earlier cycle
        return bisect_left(range(bound), step, key=self.steps_through)

    def batch_of(self, step: int) -> tuple[str, int]:
        """The bucket of a step (from 1), and which of its batches the step reads, from 0."""
        cycle = self.cycle_of(step)
        before = {bucket: self.batches_through(bucket, cycle - 1) for bucket in self.shares}
        counts = [self.batches_through(bucket, cycle) - before[bucket] for bucket in self.shares]
        key = int(round_keys(self.seed, "steps", cycle)[0])
        number, batch = interleaved(step - 1 - self.steps_through(cycle - 1), counts, key)
        bucket = list(self.shares)[number]
        return bucket, before[bucket] + batch

    def places(self, step: int, begin: int = 0, end: int | None = None) -> Places:
        """Where samples `begin` to `end` of a step's global batch are (default: all of them)."""
        bucket, batch = self.batch_of(step)
        end = self.global_batch if end is None else end
        place_B = np.arange(batch * self.global_batch + begin, batch * self.global_batch + end)
        cycle_B, place_B = np.divmod(place_B, self.per_cycle(bucket))
        for cycle in np.unique(cycle_B).tolist():
            keys, chosen = round_keys(self.seed, "cycle", bucket, cycle), cycle_B == cycle
            place_B[chosen] = permute(place_B[chosen], self.per_cycle(bucket), keys)
        ends = list(accumulate(share.per_cycle for share in self.shares[bucket]))
        share_B = np.searchsorted(ends, place_B, side="right")
        found = Places(bucket, *(np.zeros_like(place_B) for _ in range(3)))
        for number in np.unique(share_B).tolist():
            share, chosen = self.shares[bucket][number], share_B == number
            shown = cycle_B[chosen] * share.per_cycle + place_B[chosen] - (ends[number] - share.per_cycle)
            found.dataset_B[chosen] = share.dataset
            found.pass_B[chosen], found.index_B[chosen] = np.divmod(shown, share.samples)
            for turn in np.unique(found.pass_B[chosen]).tolist():
                now = chosen & (found.pass_B == turn)
                keys = round_keys(self.seed, "pass", share.dataset, bucket, turn)
                found.index_B[now] = permute(found.index_B[now], share.samples, keys)
        return found


def interleaved(place: int, counts: Sequence[int], key: int) -> tuple[int, int]:
    """(kind, number) of the item at a place of an even, keyed mixture of `counts` items of each kind.

    A kind's items come in their order, one in each of as many equal intervals as there are items.

    >>> ["abc"[interleaved(i, [6, 3, 1], key=1)[0]] for i in range(10)]
    ['a', 'b', 'a', 'a', 'b', 'a', 'b', 'a', 'c', 'a']
    """

    def before(moment: int, kind: int) -> int:
        """Items of a kind up to a moment."""
        if moment < 0 or counts[kind] == 0:
            return 0
        # Item i comes at (i + jitter) / count. In integers: at floor(v 2^30 / count), where v = i 2^32 + jitter.
        last = ((moment + 1) * counts[kind] - 1) >> 30
        item, rest = last >> 32, last & 0xFFFFFFFF
        return item + (_jitter(key, kind, item) <= rest)

    def all_before(moment: int) -> int:
        return sum(before(moment, kind) for kind in range(len(counts)))

    moment = bisect_right(range(_MOMENTS), place, key=all_before)
    rank = place - all_before(moment - 1)  # among items of one moment the kinds take turns
    for kind in range(len(counts)):
        now, earlier = before(moment, kind), before(moment - 1, kind)
        if rank < now - earlier:
            return kind, earlier + rank
        rank -= now - earlier
    raise AssertionError(f"no item {place} of {sum(counts)}")


def _jitter(key: int, kind: int, item: int) -> int:
    """32 random bits."""
    x = (key + kind * 0x9E3779B97F4A7C15 + item * 0xD1B54A32D192ED03) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return (x ^ x >> 31) >> 32
