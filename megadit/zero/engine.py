"""DeepSpeed ZeRO-1 and 2 under our own schedule (arXiv 1910.02054): the only file that imports DeepSpeed.

We own forward, backward and the pipeline; DeepSpeed owns the flat fp32 partitions, the reduction over the data-parallel
group and the gathering of updated parameters. Its optimizer class is used directly, not `deepspeed.initialize`. Those
are not public interfaces: the version is pinned, and the parity tests are the contract.

The two stages differ only in when they reduce: stage 1 once, after all microbatches, stage 2 after each of them. All
gradients are summed in fp32: those of bf16 parameters are moved to fp32 accumulators before anything is added to them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of
from megadit.zero.config import OptimConfig
from megadit.zero.groups import (
    MAX_BUCKET,
    Fragment,
    NamedParameters,
    Update,
    all_finite,
    global_norm,
    group_parameters,
    read_update,
    sum_partial,
)

KINDS = {"master": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # ours -> DeepSpeed's key


def _attach_to_process_group() -> None:
    """Let deepspeed.comm use the process group that exists."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    # Its shared-memory collective for CPUs would be compiled on the spot, half a minute on every rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


class _Optimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer with our norm, and without its hooks: we tell it when to reduce."""

    def __init__(self, grid: Grid, *args: object, **kwargs: object) -> None:
        self.grid = grid
        super().__init__(*args, **kwargs)
        self.is_sound = torch.ones((), dtype=torch.bool, device=self.single_partition_of_fp32_groups[0].device)

    def create_gradient_handling_hooks(self) -> None:
        """None: a hook would reduce during the backward of every microbatch, and zero-bubble schedules bypass them."""

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        """Always: reduced gradients are added into one fp32 buffer for each group, as large as this rank's partition.

        DeepSpeed does so for bf16 parameters only. Its other way keeps whole gradients of every parameter that touches
        the partition, and adds zeros for all those that a reduction did not see.
        """
        return True

    def partitioned_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, the range of its reduced gradient that lies in this rank's partition), live views."""
        for group_idx, parameters in enumerate(self.params_in_partition):
            # What fills up a partition belongs to no parameter, and carries a mark.
            ranges = [g for g in self.averaged_gradients[group_idx] if not getattr(g, "_zero_padding", False)]
            yield from zip(parameters, ranges, strict=True)

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """All that this rank brings to a step passes here before it is summed: one look for a whole bucket.

        A look at each gradient where it lies takes twice as long.
        """
        self.is_sound = self.is_sound & all_finite([tensor], like=self.is_sound)
        super().average_tensor(tensor, communication_data_type)

    def look(self, loss: Tensor, told: float) -> Update:
        """What the step is going to do; makes its one all-reduce, and waits for it."""
        owned = []
        for parameter, gradient in self.partitioned_gradients():
            placement = placement_of(parameter)
            if placement.is_owner(self.grid, sharded=placement.data_axes):
                owned.append(gradient)
        like = self.single_partition_of_fp32_groups[0]
        self.looked = read_update(*global_norm(owned, self.grid, like, self.is_sound, loss, told))
        return self.looked

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """DeepSpeed drops the gradients and changes nothing where `overflow` says so.

        Its own looks through the gradients again, and not at all in bf16.
        """
        self.overflow = not self.looked.applied

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Over all ranks' partitions, each element counted once.

        DeepSpeed's own makes a model-parallel all-reduce per parameter group, which hangs when one pipeline stage has
        experts and another has none.
        """
        return self.looked.norm


class ZeroEngine:
    """Optimizer state sharded over the data-parallel axes (experts: over edp), fp32 masters and moments.

    With `partition_gradients` (stage 2) no whole gradient outlives the microbatch that made it.
    """

    def __init__(
        self,
        named: NamedParameters,
        grid: Grid,
        config: OptimConfig,
        decays: Callable[[str], bool],
        partition_gradients: bool,
    ) -> None:
        _attach_to_process_group()
        self.named, self.grid = named, grid
        self._arrived: set[str] = set()  # names of the parameters that have had a gradient in this step
        expert_group = f"ep_size_{grid['ep'].size}"  # DeepSpeed parses this name
        param_groups = []
        for group in group_parameters(named, config.weight_decay, decays):
            entry = {"params": group.parameters, "weight_decay": group.weight_decay}
            if group.is_expert:
                entry |= {"moe": True, "name": expert_group}
                for parameter in group.parameters:
                    parameter.allreduce, parameter.group_name = False, expert_group  # type: ignore[attr-defined]
            param_groups.append(entry)
        has_experts = any("moe" in entry for entry in param_groups)
        expert_handles = {expert_group: grid["ep"].handle}
        expert_data_handles = {expert_group: grid["edp"].handle}
        deepspeed_groups._EXPERT_PARALLEL_GROUP = expert_handles
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP = expert_data_handles
        numel = sum(parameter.numel() for _, parameter in named)
        self.optimizer = _Optimizer(
            grid,
            torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, eps=config.eps),
            param_names={parameter: name for name, parameter in named},
            timers=NoopTimer(),
            optimizer_params={},
            verbose=False,
            contiguous_gradients=True,
            reduce_scatter=True,
            reduce_bucket_size=min(numel, MAX_BUCKET),
            # Stage 2 reduces every microbatch: each range to its owner alone, half of what an all-reduce would send.
            use_multi_rank_bucket_allreduce=not partition_gradients,
            dp_process_group=grid["dp"].handle,
            expert_parallel_group=expert_handles,
            expert_data_parallel_group=expert_data_handles,
            clip_grad=config.clip,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            partition_grads=partition_gradients,
            has_moe_layers=has_experts,
            check_grad_overflow=True,  # by `_Optimizer.check_overflow`
        )
        # DeepSpeed does without in stage 2, and divides bf16 gradients in bf16: bits are lost unless the size of dp is
        # a power of two.
        self.optimizer.use_grad_accum_attribute = self.optimizer.use_separate_grad_accum
        self._create_moments()

    def _create_moments(self) -> None:
        """AdamW makes its state at the first step; make it now, so that a checkpoint can be loaded into it."""
        for master in self.optimizer.single_partition_of_fp32_groups:
            self.optimizer.optimizer.state[master] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        self._link()

    def _link(self) -> None:
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def is_sound(self) -> bool:
        return bool(self.optimizer.is_sound)

    def accumulate(self) -> None:
        if not self._arrived:
            self.optimizer.is_sound = torch.ones_like(self.optimizer.is_sound)
        found = [(name, parameter) for name, parameter in self.named if parameter.grad is not None]
        self._arrived.update(name for name, _ in found)
        for _, parameter in found:
            # DeepSpeed copies flat views, and drops `grad.data`: a schedule may leave a transposed gradient, and one
            # that is a view, whose base would keep the memory.
            parameter.grad = parameter.grad.data.contiguous()  # type: ignore[union-attr]
        if self.optimizer.use_grad_accum_attribute:
            self.optimizer.fill_grad_accum_attribute()
        if self.optimizer.partition_gradients and found:
            self._reduce_over_data()

    def reduce_gradients(self) -> None:
        self.accumulate()
        missing = [name for name, _ in self.named if name not in self._arrived]
        assert not missing, f"{missing[0]} has no gradient: every parameter takes part in every step"
        self._arrived.clear()
        if not self.optimizer.partition_gradients:
            self._reduce_over_data()
        # Sums commute: tensor ranks own the same ranges, so each has to bring its own only, and once for each step.
        sum_partial(self.optimizer.partitioned_gradients(), self.grid)

    def _reduce_over_data(self) -> None:
        """Add the gradients that are there, divided by the size of dp, to the partitions of their owners."""
        self.optimizer.setup_buckets()
        self.optimizer.reduce_gradients()
        for _, parameter in self.named:
            # What others own: DeepSpeed would keep it, and with it the whole bucket, until the step.
            parameter.grad_accum = None  # type: ignore[attr-defined]

    def step(self, lr: float, loss: Tensor, told: float = 0.0) -> Update:
        update = self.optimizer.look(loss, told)
        self.optimizer.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        del self.optimizer.looked  # with its memory
        return update

    def fragments(self) -> list[Fragment]:
        found = []
        for name, parameter in self.named:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # none of this parameter lies in this rank's partition
                continue
            start, sharded = mapping.lp_fragment_address.start, placement_of(parameter).data_axes
            for kind, key in KINDS.items():
                found.append(Fragment(name, kind, start, mapping.get_hp_fragment(key).detach(), sharded))
        return found

    def masters(self) -> list[Fragment]:
        return [fragment for fragment in self.fragments() if fragment.kind == "master"]

    def masters_changed(self) -> None:
        self.optimizer.update_lp_params()

    def restored(self, steps: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            state["step"].fill_(steps)
        self.masters_changed()
