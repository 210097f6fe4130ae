"""Bytes on one rank, as a plan reckons them and as a dry run counts them."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """The first four stay from step to step, buffers from the first step on; the others are at their most in a step.

    gradients: with those of one stage in the parameters' own precision. activations: of all microbatches in flight,
    with what the running one needs for a moment, and the batch. buffers: for what pipeline neighbours send. updating:
    what the engine has beyond the state when the backward passes are done: gradients, and copies of them.
    """

    weights: int
    masters: int
    moments: int
    ema: int
    buffers: int
    gradients: int
    activations: int
    updating: int

    @property
    def state(self) -> int:
        """What a training holds between steps."""
        return self.weights + self.masters + self.moments + self.ema

    @property
    def peak(self) -> int:
        """An upper bound: as if gradients and activations were at their most together."""
        return self.state + self.buffers + max(self.gradients + self.activations, self.updating)
