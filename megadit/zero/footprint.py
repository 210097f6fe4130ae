"""What an engine holds and sends, reckoned from sizes alone: no tensors, no process group, no DeepSpeed.

Stage 0 is `ReferenceEngine`; stages 1 and 2 are ZeRO (arXiv 1910.02054) as `ZeroEngine` has DeepSpeed 0.19.8 do it. The
tests hold real runs against these numbers, to the byte.

Per rank, with b the bytes of a parameter's element, n all elements, and for each group g of parameters (dense or
expert, with or without weight decay) n_g its elements and r_g the ranks that share it (dp; experts: edp):

                 stage 0     stages 1 and 2
    weights      b n         sum_g b N_g,  N_g = n_g filled up to a multiple of 2 r_g; parameters are views
    masters      -           sum_g 4 N_g / r_g
    moments      2 b n       sum_g 8 N_g / r_g
    average      b n         sum_g 4 (N_g / r_g - what only fills up this rank's range)
    gradients    b n         stage 1: 4 n;  stage 2: sum_g 4 N_g / r_g

Beyond that, for a moment: the bucket of 4 min(n, MAX_BUCKET) bytes that gradients are copied into to be reduced, a flat
copy of what is sent at once, and the temporaries of AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from megadit.parallel.layout import Layout
from megadit.parallel.placement import placement_of
from megadit.zero.groups import MAX_BUCKET, NamedParameters, in_groups

Call = tuple[str, str, int]  # axis, operation, bytes of the whole tensor

FLOAT32 = 4  # bytes
ALIGNMENT = 2  # elements: a rank's range of a flat buffer is a multiple of this
# Copies of what AdamW updates at once that are alive with it: torch takes all tensors of a group at once on a GPU, and
# one tensor after the other on a CPU.
TEMPORARIES = {True: 1, False: 2}


@dataclass(frozen=True)
class LocalParameter:
    """What an engine needs to know of this rank's part of a parameter.

    data_axes, is_partial: of its `Placement` (partial: over tp). chunk: which of the rank's pipeline stages has it.
    """

    name: str
    numel: int
    data_axes: tuple[str, ...]
    is_partial: bool
    decays: bool
    chunk: int = 0


def local_parameters(stages: Iterable[NamedParameters], decays: Callable[[str], bool]) -> list[LocalParameter]:
    """The parameters of a rank's pipeline stages, in the order in which its engine gets them."""
    found = []
    for chunk, named in enumerate(stages):
        for name, parameter in named:
            placement = placement_of(parameter)
            is_partial = "tp" in placement.partial
            found.append(LocalParameter(name, parameter.numel(), placement.data_axes, is_partial, decays(name), chunk))
    return found


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank. The first four stay; the others are of gradients and all that serves them, at their most.

    gradients: between microbatches. accumulating, reducing, updating: within the engine's accumulate (with what the
    backward pass left in `p.grad`), reduce_gradients and step.
    """

    weights: int
    masters: int
    moments: int
    ema: int
    gradients: int
    accumulating: int
    reducing: int
    updating: int

    @property
    def state(self) -> int:
        """What is held between steps."""
        return self.weights + self.masters + self.moments + self.ema

    @property
    def buffers(self) -> int:
        """What the engine needs for a moment, beyond the gradients."""
        return max(self.accumulating, self.reducing, self.updating) - self.gradients


class Range(NamedTuple):
    """`numel` elements from `start` of a parameter: those from `there` on in the part of rank `owner`."""

    owner: int
    start: int
    there: int
    numel: int


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that are reduced over the same `ranks` ranks of an axis, "dp" or "edp", with one weight decay."""

    axis: str
    ranks: int
    rank: int
    weight_decay: float
    parameters: tuple[LocalParameter, ...]

    @cached_property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @cached_property
    def padded(self) -> int:
        """Elements of the flat buffer, which `ranks` equal parts of an even size fill.

        >>> FlatGroup("dp", 4, 0, 0.0, (LocalParameter("w", 17, ("edp", "ep"), False, True),)).padded
        24
        """
        return -(-self.numel // (ALIGNMENT * self.ranks)) * ALIGNMENT * self.ranks

    @cached_property
    def part(self) -> int:
        """Elements of one rank's part."""
        return self.padded // self.ranks

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each parameter begins in the flat buffer."""
        begins, at = [], 0
        for parameter in self.parameters:
            begins.append(at)
            at += parameter.numel
        return tuple(begins)

    def ranges(self, index: int) -> list[Range]:
        """How a parameter is cut over the ranks."""
        begin, end = self.starts[index], self.starts[index] + self.parameters[index].numel
        found = (self._range(index, owner) for owner in range(begin // self.part, -(-end // self.part)))
        return [part for part in found if part is not None]

    def own(self, index: int) -> Range | None:
        """This rank's range of a parameter."""
        return self._range(index, self.rank)

    def _range(self, index: int, owner: int) -> Range | None:
        begin, offset = self.starts[index], owner * self.part
        first, last = max(begin, offset), min(begin + self.parameters[index].numel, offset + self.part)
        return Range(owner, first - begin, first - offset, last - first) if first < last else None

    @property
    def filled(self) -> int:
        """Elements of this rank's part that belong to a parameter."""
        return min(max(self.numel - self.rank * self.part, 0), self.part)


class Piece(NamedTuple):
    """A range of what is reduced together. target: (group, start in this rank's part) where it is this rank's own."""

    start: int
    numel: int
    owner: int
    target: tuple[int, int] | None


class Sending(NamedTuple):
    """One collective over some pieces, as one flat tensor. To `owner` alone, or to all (None)."""

    axis: str
    owner: int | None
    pieces: list[Piece]

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)

    @property
    def call(self) -> Call:
        return self.axis, "all-reduce" if self.owner is None else "reduce", FLOAT32 * self.numel

    @property
    def copied(self) -> int:
        """Elements of the flat copy; a single piece is sent from where it lies."""
        return self.numel if len(self.pieces) > 1 else 0


class Fill(NamedTuple):
    """Gradients that are reduced together: those in the bucket, or one that is larger than it (`is_large`)."""

    members: list[tuple[int, int]]  # (group, parameter in it)
    is_large: bool
    sendings: list[Sending]


class _Level:
    """Bytes that are alive, and the most there were."""

    def __init__(self, now: int) -> None:
        self.now = self.most = now

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)


class WholeState:
    """Stage 0: every rank holds all of its parameters' state, in their own precision."""

    def __init__(
        self, parameters: Sequence[LocalParameter], dtype: torch.dtype, layout: Layout, rank: int, weight_decay: float
    ) -> None:
        self.itemsize, self.layout = dtype.itemsize, layout
        self.groups = flat_groups(parameters, layout, rank, weight_decay)
        self.partial = sum(parameter.numel for parameter in parameters if parameter.is_partial)

    def footprint(self, turns: Iterable[int], foreach: bool = True) -> Footprint:
        """`turns`: as in `ZeroState`; no matter here. `foreach`: AdamW takes all tensors at once, as on a GPU."""
        numel = sum(group.numel for group in self.groups)
        # A flat copy of what is summed, and the sum; or the sum, and its quotient.
        reduced = [group.numel for group in self.groups if self.layout.dp > 1] + [self.partial] * (self.layout.tp > 1)
        return Footprint(
            weights=self.itemsize * numel,
            masters=0,
            moments=2 * self.itemsize * numel,
            ema=self.itemsize * numel,
            gradients=self.itemsize * numel,
            accumulating=self.itemsize * numel,
            reducing=self.itemsize * (numel + 2 * max(reduced, default=0)),
            updating=self.itemsize * (numel + max(adamw_temporaries(group, foreach) for group in self.groups)),
        )

    def after_microbatch(self, chunk: int) -> list[Call]:
        """Collectives of accumulate after the backward pass of one microbatch of one of the rank's stages."""
        return []

    def at_the_end(self) -> list[Call]:
        """Collectives of reduce_gradients."""
        sums = [("tp", "all-reduce", self.itemsize * self.partial)] if self.partial and self.layout.tp > 1 else []
        return sums + [
            (group.axis, "all-reduce", self.itemsize * group.numel) for group in self.groups if group.ranks > 1
        ]

    def of_step(self) -> list[Call]:
        """Collectives of step: the norm."""
        return norm_call(self.layout, self.itemsize)

    def collectives(self, microbatches: int) -> list[Call]:
        """All of one optimizer step."""
        return self.at_the_end() + self.of_step()


class ZeroState:
    """Stages 1 and 2: float32 masters, moments and, in stage 2, gradients are cut over the data-parallel ranks.

    DeepSpeed's own reductions are made over a group of one rank too, where they move nothing.
    """

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        dtype: torch.dtype,
        layout: Layout,
        rank: int,
        weight_decay: float,
        stage: int,
        max_bucket: int = MAX_BUCKET,
    ) -> None:
        assert stage in (1, 2), stage
        self.itemsize, self.layout, self.stage = dtype.itemsize, layout, stage
        self.groups = flat_groups(parameters, layout, rank, weight_decay)
        self.bucket = min(sum(parameter.numel for parameter in parameters), max_bucket)
        self.chunks = [
            {parameter.name for parameter in parameters if parameter.chunk == chunk}
            for chunk in sorted({parameter.chunk for parameter in parameters})
        ]

    @property
    def has_accumulators(self) -> bool:
        """Whether gradients are moved out of `p.grad`, to be summed in float32."""
        return self.itemsize != FLOAT32

    def members(self, names: Container[str] | None = None) -> Iterator[tuple[int, int]]:
        """(group, parameter in it), of all parameters or of those."""
        for g, group in enumerate(self.groups):
            for index, parameter in enumerate(group.parameters):
                if names is None or parameter.name in names:
                    yield g, index

    def numel(self, member: tuple[int, int]) -> int:
        return self.groups[member[0]].parameters[member[1]].numel

    def fills(self, names: Container[str] | None = None) -> list[Fill]:
        """The reduction of these parameters' gradients: they fill the bucket one after the other."""
        filled: list[list[tuple[int, int]]] = []
        room = 0
        for member in self.members(names):
            if not filled or self.numel(member) > room:
                filled.append([])
                room = self.bucket
            filled[-1].append(member)
            room -= self.numel(member)
        return [
            Fill(members, self.numel(members[0]) > self.bucket, self._sendings(self._pieces(members)))
            for members in filled
        ]

    def _pieces(self, members: list[tuple[int, int]]) -> list[tuple[str, Piece]]:
        """What each rank owns of a fill; what is for one other rank, side by side, is one piece."""
        found: list[tuple[str, Piece]] = []
        begin = 0
        for g, index in members:
            group = self.groups[g]
            for part in group.ranges(index):
                target = (g, part.there) if part.owner == group.rank else None
                piece = Piece(begin + part.start, part.numel, part.owner, target)
                if found and target is None and (found[-1][0], found[-1][1].owner) == (group.axis, part.owner):
                    before = found.pop()[1]
                    piece = Piece(before.start, before.numel + piece.numel, piece.owner, None)
                found.append((group.axis, piece))
            begin += self.numel((g, index))
        return found

    def _sendings(self, pieces: list[tuple[str, Piece]]) -> list[Sending]:
        """Stage 1: an all-reduce for each axis. Stage 2: a reduce for each axis and owner."""
        found: dict[tuple[str, int | None], list[Sending]] = {}
        together: dict[tuple[str, int | None], int] = {}  # elements of the last sending of each
        for axis, piece in pieces:
            key = axis, piece.owner if self.stage == 2 else None
            # More than a bucket is not sent at once: of a gradient that is larger itself, once that much is together.
            if key not in found or together[key] > self.bucket:
                found.setdefault(key, []).append(Sending(*key, []))
                together[key] = 0
            found[key][-1].pieces.append(piece)
            together[key] += piece.numel
        return [sending for sendings in found.values() for sending in sendings]

    def is_freed_early(self, member: tuple[int, int]) -> bool:
        """Whether a gradient that is larger than the bucket goes when it has been reduced; the others go at the end."""
        is_own = self.groups[member[0]].own(member[1]) is not None
        return self.has_accumulators if is_own else self.stage == 2

    def after_microbatch(self, chunk: int) -> list[Call]:
        """Collectives of accumulate after the backward pass of one microbatch of one of the rank's stages."""
        return self._reduction(self.chunks[chunk]) if self.stage == 2 else []

    def _reduction(self, names: Container[str] | None) -> list[Call]:
        return [sending.call for fill in self.fills(names) for sending in fill.sendings]

    def at_the_end(self) -> list[Call]:
        """Collectives of reduce_gradients: the whole reduction in stage 1, and what tensor ranks sum of their parts."""
        reduction = self._reduction(None) if self.stage == 1 else []
        return reduction + ([("tp", "all-reduce", FLOAT32 * self.partial)] if self.partial else [])

    @cached_property
    def partial(self) -> int:
        """Elements of this rank's part whose gradients are summed over tp."""
        if self.layout.tp == 1:
            return 0
        own = [self.groups[g].own(i) for g, i in self.members() if self.groups[g].parameters[i].is_partial]
        return sum(part.numel for part in own if part is not None)

    def of_step(self) -> list[Call]:
        """Collectives of step: the norm, and the updated parameters."""
        return norm_call(self.layout, FLOAT32) + [
            (group.axis, "all-gather", self.itemsize * group.padded) for group in self.groups if group.ranks > 1
        ]

    def collectives(self, microbatches: int) -> list[Call]:
        """All of one optimizer step."""
        each = [call for chunk in range(len(self.chunks)) for call in self.after_microbatch(chunk)]
        return each * microbatches + self.at_the_end() + self.of_step()

    def footprint(self, turns: Iterable[int], foreach: bool = True) -> Footprint:
        """`turns`: which of the rank's stages each backward pass of a step is of, in their order.

        `foreach`: AdamW takes all tensors at once, as on a GPU. Here that is one for each group, and it matters for its
        temporaries alone.
        """
        parts = sum(FLOAT32 * group.part for group in self.groups)
        whole = sum(FLOAT32 * group.numel for group in self.groups)
        return Footprint(
            weights=sum(self.itemsize * group.padded for group in self.groups),
            masters=parts,
            moments=2 * parts,
            ema=sum(FLOAT32 * group.filled for group in self.groups),
            gradients=whole if self.stage == 1 else parts,
            accumulating=self._accumulating(turns),
            reducing=self._reducing(parts, whole),
            updating=self._updating(parts, foreach),
        )

    def _accumulating(self, turns: Iterable[int]) -> int:
        most, arrived = 0, set[int]()
        for chunk in turns:
            most = max(most, self._taking(chunk, arrived))
            arrived.add(chunk)
        return most

    def _taking(self, chunk: int, arrived: Set[int]) -> int:
        """A stage's gradients of one microbatch are taken; of those in `arrived` some were before."""
        members = list(self.members(self.chunks[chunk]))
        level = _Level(sum(self.itemsize * self.numel(member) for member in members))
        if self.stage == 1:
            kept = arrived if self.has_accumulators else arrived - {chunk}  # else summed where they arrive
            level.add(sum(FLOAT32 * self.numel(m) for other in kept for m in self.members(self.chunks[other])))
        else:
            level.add(sum(FLOAT32 * group.part for group in self.groups) * bool(arrived))
        if self.has_accumulators:
            for member in members:
                level.add(FLOAT32 * self.numel(member))
                if self.stage == 1 and chunk in arrived:  # added to what is there
                    level.add(-FLOAT32 * self.numel(member))
                level.add(-self.itemsize * self.numel(member))
        if self.stage == 2:
            self._reduce(level, self.chunks[chunk], has_parts=bool(arrived))
        return level.most

    def _reducing(self, parts: int, whole: int) -> int:
        level = _Level(parts)
        if self.stage == 1:
            level = _Level(whole)
            self._reduce(level, None, has_parts=False)
        level.add(2 * FLOAT32 * self.partial)  # a flat copy, and the sum
        return level.most

    def _reduce(self, level: _Level, names: Container[str] | None, has_parts: bool) -> None:
        """Follow the reduction of these gradients, which are on the level; their parts remain there."""
        made = set(range(len(self.groups))) if has_parts else set()
        late = 0
        level.add(FLOAT32 * self.bucket)
        for fill in self.fills(names):
            nbytes = FLOAT32 * sum(self.numel(member) for member in fill.members)
            level.add(0 if fill.is_large else -nbytes)  # in the bucket now
            targets = [piece.target for sending in fill.sendings for piece in sending.pieces]
            for g in {target[0] for target in targets if target is not None} - made:
                level.add(FLOAT32 * self.groups[g].part)
                made.add(g)
            for sending in fill.sendings:
                level.add(FLOAT32 * sending.copied)
                level.add(-FLOAT32 * sending.copied)
            if fill.is_large and self.is_freed_early(fill.members[0]):
                level.add(-nbytes)
            elif fill.is_large:
                late += nbytes
        level.add(FLOAT32 * sum(group.part for g, group in enumerate(self.groups) if g not in made))
        level.add(-late - FLOAT32 * self.bucket)

    def _updating(self, parts: int, foreach: bool) -> int:
        """Group after group is updated, and its gradient dropped."""
        level = _Level(parts)
        for group in self.groups:
            level.add(TEMPORARIES[foreach] * FLOAT32 * group.part)
            level.add(-(TEMPORARIES[foreach] + 1) * FLOAT32 * group.part)
        return level.most


def flat_groups(
    parameters: Sequence[LocalParameter], layout: Layout, rank: int, weight_decay: float
) -> list[FlatGroup]:
    """The parameters by what they are reduced over and whether they decay, in the order of `group_parameters`."""
    keys = [(p.data_axes, weight_decay if p.decays else 0.0) for p in parameters]
    found = []
    for (axes, decay), members in in_groups(parameters, keys):
        ranks = layout.members(axes, rank)
        found.append(FlatGroup("dp" if "ep" in axes else "edp", len(ranks), ranks.index(rank), decay, tuple(members)))
    return found


def adamw_temporaries(group: FlatGroup, foreach: bool) -> int:
    """Elements that torch's AdamW makes for a moment: of all its tensors at once, else of one after the other."""
    sizes = [parameter.numel for parameter in group.parameters]
    if foreach:
        return TEMPORARIES[True] * sum(sizes)
    # The last one of the tensor before is still there.
    return max(before + TEMPORARIES[False] * size for before, size in zip([0, *sizes], sizes, strict=False))


def norm_call(layout: Layout, itemsize: int) -> list[Call]:
    """The square, the loss, and what ranks tell are summed over the world."""
    return [("world", "all-reduce", 3 * itemsize)] if len(layout.ranks.flatten()) > 1 else []


def state_of(
    stage: int,
    parameters: Sequence[LocalParameter],
    dtype: torch.dtype,
    layout: Layout,
    rank: int,
    weight_decay: float,
) -> WholeState | ZeroState:
    """What the engine of a ZeRO stage holds and sends on one rank."""
    if stage == 0:
        return WholeState(parameters, dtype, layout, rank, weight_decay)
    return ZeroState(parameters, dtype, layout, rank, weight_decay, stage)
