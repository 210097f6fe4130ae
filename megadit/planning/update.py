"""What the engine costs a rank besides its collectives: gradients into buckets, the norm, AdamW, the moving average.

A small model has many small tensors, and all of this is done tensor by tensor. The numbers are what torch 2.13's AdamW
and DeepSpeed 0.19.8 dispatch; a test counts them again.
"""

from __future__ import annotations

from typing import NamedTuple

from megadit.zero.footprint import FLOAT32, WholeState, ZeroState


class Passes(NamedTuple):
    """kernels: for each tensor. elements: read or written for each of its elements."""

    kernels: int
    elements: int


# AdamW reads or writes 21 elements for each of its parameter's (decay 2, first moment 3, second 6, root 2, division 2,
# eps 2, update 4), the norm 1, clipping 2; the average 3. Whether gradients are finite: 1.
_WHOLE = Passes(kernels=13, elements=28)
_WHOLE_FOREACH = Passes(kernels=4, elements=28)  # torch takes a group's tensors at once, but for norm and average
_REDUCED = Passes(kernels=1, elements=9)  # flat copy, sum, quotient, copy back
# ZeRO: what it does to all gradients, and to those in this rank's part, of which AdamW sees one flat tensor.
_BUCKET = Passes(kernels=2, elements=9)  # whether they are finite, too
_OWNED = Passes(kernels=6, elements=37)
_FLAT = 25  # kernels for each group of parameters: AdamW, overflow, clipping, gathering
_ACCUMULATED = Passes(kernels=2, elements=4)  # a bfloat16 gradient is made float32, and added


class Update(NamedTuple):
    """Of one step on one rank."""

    kernels: int
    nbytes: int


def update_of(engine: WholeState | ZeroState, microbatches: int, foreach: bool) -> Update:
    """`foreach`: AdamW takes all tensors at once, as on a GPU."""
    tensors = sum(len(group.parameters) for group in engine.groups)
    numel = sum(group.numel for group in engine.groups)
    if isinstance(engine, WholeState):
        each = _WHOLE_FOREACH if foreach else _WHOLE
        kernels, elements = each.kernels * tensors, each.elements * numel
        if engine.layout.dp > 1:
            kernels, elements = kernels + _REDUCED.kernels * tensors, elements + _REDUCED.elements * numel
        return Update(kernels, engine.itemsize * elements)
    times = microbatches if engine.stage == 2 else 1
    owned = sum(-(-len(group.parameters) // group.ranks) for group in engine.groups)  # on average
    part = sum(group.part for group in engine.groups)
    kernels = times * _BUCKET.kernels * tensors + _OWNED.kernels * owned + _FLAT * len(engine.groups)
    elements = times * _BUCKET.elements * numel + _OWNED.elements * part
    if engine.has_accumulators:
        kernels += microbatches * _ACCUMULATED.kernels * tensors
        elements += microbatches * _ACCUMULATED.elements * numel
    return Update(kernels, FLOAT32 * elements)
