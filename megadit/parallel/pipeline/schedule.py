"""Runs a stage over microbatches: torch.distributed.pipelining's schedules over our pipeline group.

With one stage, 1F1B is gradient accumulation, so a single process takes the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from megadit.parallel.grid import Group

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """One process's stage and the schedules that run it.

    The stage is called with the carry of the stage before it (the first one: with the batch) and with keyword
    arguments, which every rank supplies from its own copy of the batch; those must not require gradients, for the
    schedules would drop them silently.
    """

    def __init__(
        self, stage: nn.Module, group: Group, device: torch.device, num_microbatches: int, loss: LossFunction
    ) -> None:
        """`loss(output, target)` of one microbatch is a scalar; gradients of all microbatches are summed."""
        self.stage, self.group, self.device, self.loss = stage, group, device, loss
        self.num_microbatches = num_microbatches
        # A schedule fixes the shapes of what it sends, so there is one for each shape.
        self._schedules: dict[Any, Schedule1F1B] = {}

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    @property
    def is_last(self) -> bool:
        return self.group.rank == self.group.size - 1

    def _schedule(self, train: bool, num_microbatches: int, batch: Tensor, keywords: dict[str, Any]) -> Schedule1F1B:
        shapes = tuple((key, value.shape if isinstance(value, Tensor) else value) for key, value in keywords.items())
        key = (train, num_microbatches, batch.shape, shapes)
        if key not in self._schedules:
            stage = PipelineStage(self.stage, self.group.rank, self.group.size, self.device, group=self.group.handle)
            # scale_grads would divide p.grad after the fact, also what other steps accumulated: the loss divides.
            self._schedules[key] = Schedule1F1B(
                stage, num_microbatches, loss_fn=self.loss if train else None, scale_grads=False
            )
        return self._schedules[key]

    def train(self, batch: Tensor, target: Tensor, keywords: dict[str, Any]) -> Tensor:
        """Forward and backward of all microbatches; gradients accumulate in `p.grad`.

        `batch`, `target` and the tensors among `keywords` have the local batch as dimension 0, equal on all ranks of
        the pipeline. Returns the sum of the microbatches' losses on the last stage and zero elsewhere.
        """
        for name, value in keywords.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"keyword argument {name} requires gradients, which the pipeline would drop")
        schedule = self._schedule(True, self.num_microbatches, batch, keywords)
        losses: list[Tensor] = []
        schedule.step(
            *([batch] if self.is_first else []),
            target=target if self.is_last else None,
            losses=losses if self.is_last else None,
            return_outputs=False,
            **keywords,
        )
        total = batch.new_zeros(())
        for loss in losses:
            total += loss.detach()
        return total

    @torch.no_grad()
    def forward(self, batch: Tensor, keywords: dict[str, Any], num_microbatches: int = 1) -> Tensor:
        """The last stage's output, on every rank of the pipeline; it has the shape and the dtype of `batch`.

        The batch is cut into `num_microbatches`, at least one for each stage, and padded with copies of its last
        sample to fill them.
        """
        size, count = batch.shape[0], max(num_microbatches, self.group.size)
        padded = -(-size // count) * count

        def pad(value: Any) -> Any:
            if not isinstance(value, Tensor) or padded == size:
                return value
            return torch.cat([value, value[-1:].expand(padded - size, *value.shape[1:])])

        batch, keywords = pad(batch), {key: pad(value) for key, value in keywords.items()}
        output = self._schedule(False, count, batch, keywords).eval(*([batch] if self.is_first else []), **keywords)
        if self.group.size > 1:
            output = output.contiguous() if self.is_last else batch.new_empty(batch.shape)
            dist.broadcast(output, group=self.group.handle, group_src=self.group.size - 1)
        return output[:size]
