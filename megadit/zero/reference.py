"""The oracle: torch's AdamW on whole gradients after a plain all-reduce, in the parameters' own precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of
from megadit.zero.config import OptimConfig
from megadit.zero.groups import (
    Fragment,
    NamedParameters,
    Update,
    all_finite,
    all_reduce_gradients,
    global_norm,
    group_parameters,
    read_update,
    sum_partial,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


class ReferenceEngine:
    """Every rank holds all the optimizer state of its parameters."""

    def __init__(self, named: NamedParameters, grid: Grid, config: OptimConfig, decays: Callable[[str], bool]) -> None:
        self.named, self.grid, self.config = named, grid, config
        self.groups = group_parameters(named, config.weight_decay, decays)
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "weight_decay": group.weight_decay} for group in self.groups],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
        )
        for _, parameter in named:
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                **{moment: torch.zeros_like(parameter, memory_format=torch.contiguous_format) for moment in MOMENTS},
            }

        self._sound = torch.ones((), dtype=torch.bool, device=named[0][1].device)

    @property
    def is_sound(self) -> bool:
        return bool(self._sound)

    def accumulate(self) -> None:
        """Nothing: gradients pile up in `p.grad`, in the parameters' own precision."""

    def reduce_gradients(self) -> None:
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        self._sound = all_finite(gradients, like=self._sound)
        sum_partial([(p, p.grad) for _, p in self.named if p.grad is not None], self.grid)
        for group in self.groups:
            gradients = [p.grad for p in group.parameters if p.grad is not None]
            all_reduce_gradients(gradients, group.data_axes, self.grid, divide_by=self.grid["dp"].size)

    def step(self, lr: float, loss: Tensor, told: float = 0.0) -> Update:
        held = [parameter for _, parameter in self.named if parameter.grad is not None]
        owned = [p.grad for p in held if p.grad is not None and placement_of(p).is_owner(self.grid)]
        update = read_update(*global_norm(owned, self.grid, held[0], self._sound, loss, told))
        if update.applied:
            if self.config.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(held, self.config.clip, update.norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return update

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, moment, 0, self.optimizer.state[parameter][moment].view(-1), sharded=())
            for name, parameter in self.named
            for moment in MOMENTS
        ]

    def masters(self) -> list[Fragment]:
        return [Fragment(name, "weight", 0, parameter.detach().view(-1), sharded=()) for name, parameter in self.named]

    def masters_changed(self) -> None:
        """Nothing: they are the parameters."""

    def restored(self, steps: int) -> None:
        for _, parameter in self.named:
            self.optimizer.state[parameter]["step"].fill_(steps)
