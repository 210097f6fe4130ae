"""Runs a stage over microbatches: torch.distributed.pipelining's schedules over our pipeline group.

With one stage, 1F1B is gradient accumulation, so a single process takes the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from megadit.parallel.grid import Group
from megadit.parallel.pipeline.partition import stage_indices

SCHEDULES = {"1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble}

LossFunction = Callable[[Any, Tensor], Tensor]
# (the batch, its keyword arguments, in how many microbatches each stage saw it), without what fills them.
Listener = Callable[[Tensor, dict[str, Any], int], None]


class Stage(PipelineStage):
    """A stage that says when the gradients of one microbatch are in `p.grad`."""

    def __init__(self, *args: Any, after_backward: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._after_backward = after_backward
        self._released: list[tuple[torch.UntypedStorage, int]] = []

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if self.has_backward and full_backward:
            self._after_backward()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if self.has_backward:
            self._after_backward()

    @property
    def buffers(self) -> Iterator[Tensor]:
        """Where it receives, and what stages of one rank handed one another last, for every microbatch."""
        for row in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
            yield from (info.buffer for info in row if info.buffer is not None)

    def release(self) -> None:
        """Give the buffers' memory back between two steps, contents and all."""
        for buffer in self.buffers:
            storage = buffer.untyped_storage()
            if storage.nbytes():  # else another one shares it
                self._released.append((storage, storage.nbytes()))
                storage.resize_(0)

    def reclaim(self) -> None:
        """Take as much memory again before a step."""
        for storage, nbytes in self._released:
            storage.resize_(nbytes)
        self._released.clear()

    # Without a backward pass, a schedule still hands gradients between two stages of one rank: there are none.

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class Pipeline:
    """One process's stages and the schedules that run them.

    A stage is called with the carry of the stage before it (the first one: with the batch) and with keyword
    arguments, which every rank supplies from its own copy of the batch; those must not require gradients, for the
    schedules would drop them silently.
    """

    stage_class = Stage

    def __init__(
        self,
        stages: Sequence[nn.Module],
        group: Group,
        device: torch.device,
        num_microbatches: int,
        loss: LossFunction,
        schedule: str = "1f1b",
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """`stages`: those of `stage_indices`, in that order. `loss(output, target)` of one microbatch is a scalar.

        Gradients of all microbatches are summed in `p.grad`; `after_backward` is called when those of one microbatch
        of one stage are there, and may take them away.
        """
        self.stages, self.group, self.device, self.loss = stages, group, device, loss
        self.num_microbatches, self.schedule, self.after_backward = num_microbatches, schedule, after_backward
        self.num_stages = len(stages) * group.size
        self.indices = stage_indices(schedule, group.rank, group.size, len(stages))
        # A schedule fixes the shapes of what it sends, so there is one for each shape, with stages of its own. Only the
        # one that ran last holds memory: with many shapes their buffers would outgrow the model.
        self._schedules: dict[Any, tuple[Any, list[Stage]]] = {}
        self._holding: list[Stage] = []
        # Told of each `forward` when it is done. A stage's own hooks cannot tell: a schedule runs it once more to learn
        # shapes, fills its microbatches up, and cuts one batch into several.
        self.listeners: list[Listener] = []

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the first stage."""
        return 0 in self.indices

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the last stage."""
        return self.num_stages - 1 in self.indices

    @property
    def last_rank(self) -> int:
        """The rank, in the pipeline's group, of the last stage."""
        return 0 if self.schedule == "zbv" else self.group.size - 1

    def _stage(self, index: int, module: nn.Module, **shapes: tuple[Tensor, ...]) -> Stage:
        return self.stage_class(
            module,
            index,
            self.num_stages,
            self.device,
            group=self.group.handle,
            after_backward=self.after_backward,
            **shapes,
        )

    def _schedule(self, train: bool, num_microbatches: int, batch: Tensor, keywords: dict[str, Any]) -> Any:
        shapes = tuple((key, value.shape if isinstance(value, Tensor) else value) for key, value in keywords.items())
        key = (train, num_microbatches, batch.shape, shapes)
        if key not in self._schedules:
            stages = [self._stage(index, module) for index, module in zip(self.indices, self.stages, strict=True)]
            # scale_grads would divide p.grad after the fact, also what other steps accumulated: the loss divides.
            schedule = SCHEDULES[self.schedule](
                stages[0] if self.schedule == "1f1b" else stages,
                num_microbatches,
                loss_fn=self.loss if train else None,
                scale_grads=False,
            )
            self._schedules[key] = schedule, stages
        schedule, stages = self._schedules[key]
        if stages is not self._holding:
            for stage in self._holding:
                stage.release()
            for stage in stages:
                stage.reclaim()
            self._holding = stages
        return schedule

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
        total = batch.new_zeros((), dtype=torch.promote_types(batch.dtype, torch.float32))
        for loss in losses:
            total += loss.detach()
        return total

    @torch.no_grad()
    def forward(self, batch: Tensor, keywords: dict[str, Any], num_microbatches: int = 1, multiple: int = 1) -> Tensor:
        """The last stage's output (the first of them), on every rank; it has the shape and the dtype of `batch`.

        The batch is cut into `num_microbatches`, at least one for each rank, and padded with copies of its last
        sample to fill them; each is a `multiple` of that many samples.
        """
        size, count = batch.shape[0], max(num_microbatches, self.group.size)
        padded = -(-size // (count * multiple)) * count * multiple

        def pad(value: Any) -> Any:
            if not isinstance(value, Tensor) or padded == size:
                return value
            return torch.cat([value, value[-1:].expand(padded - size, *value.shape[1:])])

        whole, told = pad(batch), {key: pad(value) for key, value in keywords.items()}
        output = self._schedule(False, count, whole, told).eval(*([whole] if self.is_first else []), **told)
        output = output[0] if isinstance(output, tuple) else output
        for listener in self.listeners:
            listener(batch, keywords, count)
        if self.group.size > 1:
            output = output.contiguous() if self.is_last else whole.new_empty(whole.shape)
            dist.broadcast(output, group=self.group.handle, group_src=self.last_rank)
        return output[:size]
