"""ZeRO played without DeepSpeed, for tensors that have sizes and no numbers: the meta device of a dry run.

It does what `ZeroState` says, kernel by kernel as DeepSpeed does: it holds the same, sends the same over the grid's
groups, and needs the same for a moment. Nothing is computed, so it knows no learning rate and clips by no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megadit.parallel.grid import Grid
from megadit.parallel.placement import placement_of
from megadit.zero.config import OptimConfig
from megadit.zero.footprint import Fill, LocalParameter, Range, Sending, ZeroState, local_parameters
from megadit.zero.groups import (
    MAX_BUCKET,
    Fragment,
    NamedParameters,
    Update,
    global_norm,
    read_update,
    sum_partial,
)

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
Claim = Callable[[str, Sequence[Tensor]], None]


class SimulatedZero:
    """An `Engine` of stage 1 or 2.

    `claim(category, tensors)` is told at once of every tensor that it makes: "weights", "masters", "moments",
    "gradients" or "buffers"; not of AdamW's temporaries. `foreach`: AdamW takes all tensors of a group at once, as
    torch does on a GPU.
    """

    def __init__(
        self,
        named: NamedParameters,
        grid: Grid,
        config: OptimConfig,
        decays: Callable[[str], bool],
        stage: int,
        foreach: bool = True,
        max_bucket: int = MAX_BUCKET,
        claim: Claim = lambda category, tensors: None,
    ) -> None:
        self.named, self.grid, self.config, self.claim = named, grid, config, claim
        first = named[0][1]
        self.dtype, self.device = first.dtype, first.device
        local = local_parameters([named], decays)
        layout, decay = grid.layout, config.weight_decay
        self.state = ZeroState(local, self.dtype, layout, grid.rank, decay, stage, max_bucket)
        parameters = dict(named)
        self.parameters = [[parameters[p.name] for p in group.parameters] for group in self.state.groups]
        self.flats = [self._flatten(group) for group in range(len(self.parameters))]
        self.master_parts = [self._make("masters", group.part) for group in self.state.groups]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [master], "weight_decay": group.weight_decay}
                for master, group in zip(self.master_parts, self.state.groups, strict=True)
            ],
            betas=config.betas,
            eps=config.eps,
            foreach=foreach,
        )
        for master in self.master_parts:
            moments = {key: self._make("moments", master.numel()) for key in MOMENTS}
            self.optimizer.state[master] = {"step": torch.zeros((), device="cpu"), **moments}
        self._accumulators: dict[str, Tensor] = {}  # whole gradients in float32
        self._parts: dict[int, Tensor] = {}  # this rank's part of each group's reduced gradient

    def _make(self, category: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.empty(numel, dtype=dtype, device=self.device)
        self.claim(category, [made])
        return made

    def _flatten(self, group: int) -> Tensor:
        """Move a group's parameters into one buffer."""
        flat = self._make("weights", self.state.groups[group].padded, self.dtype)
        for parameter, begin in zip(self.parameters[group], self.state.groups[group].starts, strict=True):
            parameter.data = flat.narrow(0, begin, parameter.numel()).view(parameter.shape)
        return flat

    def _own(self) -> Iterator[tuple[int, LocalParameter, nn.Parameter, Range]]:
        """(group, parameter twice over, its range in this rank's part) of all parameters that have one."""
        for g, group in enumerate(self.state.groups):
            for index, parameter in enumerate(group.parameters):
                part = group.own(index)
                if part is not None:
                    yield g, parameter, self.parameters[g][index], part

    def _partitioned_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for g, _, parameter, part in self._own():
            yield parameter, self._parts[g].narrow(0, part.there, part.numel)

    def accumulate(self) -> None:
        found = []
        for name, parameter in self.named:
            if parameter.grad is not None:
                found.append(name)
                parameter.grad = parameter.grad.contiguous()
                self.claim("gradients", [parameter.grad])
        if self.state.has_accumulators:
            for parameters, group in zip(self.parameters, self.state.groups, strict=True):
                for parameter, local in zip(parameters, group.parameters, strict=True):
                    self._accumulate_in_float32(local.name, parameter)
        if self.state.stage == 2 and found:
            self._reduce_over_data(found)

    def _accumulate_in_float32(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        gradient = parameter.grad.float()
        self.claim("gradients", [gradient])
        if name in self._accumulators:
            self._accumulators[name].add_(gradient)
        else:
            self._accumulators[name] = gradient
        parameter.grad = None

    def reduce_gradients(self) -> None:
        self.accumulate()
        if self.state.stage == 1:
            self._reduce_over_data([name for name, _ in self.named])
        sum_partial(self._partitioned_gradients(), self.grid)

    def _reduce_over_data(self, names: Sequence[str]) -> None:
        """Add these gradients, over the size of dp, to the parts of their owners."""
        if not self.state.has_accumulators:
            for name, parameter in self.named:
                if name in names:
                    assert parameter.grad is not None, f"{name} has no gradient"
                    self._accumulators[name], parameter.grad = parameter.grad, None
        bucket = self._make("gradients", self.state.bucket)
        for fill in self.state.fills(set(names)):
            tensor = self._take(fill, bucket)
            for sending in fill.sendings:
                for piece in sending.pieces:
                    if piece.target is not None:
                        self._part(piece.target[0])
            tensor.div_(self.grid["dp"].size)
            for sending in fill.sendings:
                self._send(sending, tensor)
            if fill.is_large and self.state.is_freed_early(fill.members[0]):
                self._accumulators.pop(self._name(fill.members[0]))
        for group in range(len(self.parameters)):
            self._part(group)
        self._accumulators.clear()

    def _name(self, member: tuple[int, int]) -> str:
        return self.state.groups[member[0]].parameters[member[1]].name

    def _take(self, fill: Fill, bucket: Tensor) -> Tensor:
        """What is reduced together: gradients copied into the bucket, or a large one where it is."""
        if fill.is_large:
            return self._accumulators[self._name(fill.members[0])].view(-1)
        at = 0
        for member in fill.members:
            gradient = self._accumulators.pop(self._name(member)).view(-1)
            bucket.narrow(0, at, gradient.numel()).copy_(gradient)
            at += gradient.numel()
        return bucket.narrow(0, 0, at)

    def _part(self, group: int) -> Tensor:
        if group not in self._parts:
            self._parts[group] = self._make("gradients", self.state.groups[group].part).zero_()
        return self._parts[group]

    def _send(self, sending: Sending, tensor: Tensor) -> None:
        """Reduce the pieces as one flat tensor; a rank adds its own to its part."""
        group, pieces = self.grid[sending.axis], [tensor.narrow(0, p.start, p.numel) for p in sending.pieces]
        flat = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if len(pieces) > 1:
            self.claim("gradients", [flat])
        if sending.owner is None:
            dist.all_reduce(flat, group=group.handle)
        else:
            dist.reduce(flat, group=group.handle, group_dst=sending.owner)
        summed = flat.split([piece.numel for piece in sending.pieces])
        for piece, where, values in zip(sending.pieces, pieces, summed, strict=True):
            if piece.target is not None:
                self._parts[piece.target[0]].narrow(0, piece.target[1], piece.numel).add_(values)
            if piece.owner == group.rank:
                where.copy_(values)

    @property
    def is_sound(self) -> bool:
        """True: nothing is computed."""
        return True

    def _look(self, loss: Tensor, told: float) -> Update:
        owned = []
        for parameter, gradient in self._partitioned_gradients():
            placement = placement_of(parameter)
            if placement.is_owner(self.grid, sharded=placement.data_axes):
                owned.append(gradient)
        like = self.master_parts[0]
        is_sound = torch.ones((), dtype=torch.bool, device=like.device)
        return read_update(*global_norm(owned, self.grid, like, is_sound, loss, told))

    def step(self, lr: float, loss: Tensor, told: float = 0.0) -> Update:
        update = self._look(loss, told)
        groups = self.optimizer.param_groups
        for g, (master, flat, group) in enumerate(zip(self.master_parts, self.flats, self.state.groups, strict=True)):
            master.grad = self._parts.pop(g)
            if self.config.clip > 0:
                master.grad.mul_(update.norm)
            self.optimizer.param_groups = [groups[g]]
            self.optimizer.step()
            master.grad = None
            flat.narrow(0, group.rank * group.part, group.part).copy_(master)
        self.optimizer.param_groups = groups
        self._gather()
        return update

    def _gather(self) -> None:
        """Every rank gets the parts of all."""
        for flat, group in zip(self.flats, self.state.groups, strict=True):
            if group.ranks > 1:
                own = flat.narrow(0, group.rank * group.part, group.part)
                _all_gather(flat, own, group=self.grid[group.axis].handle)

    def fragments(self) -> list[Fragment]:
        found = []
        for g, local, _, part in self._own():
            master = self.master_parts[g]
            moments = {key: self.optimizer.state[master][key] for key in MOMENTS}
            for kind, whole in {"master": master, **moments}.items():
                flat = whole.detach().narrow(0, part.there, part.numel)
                found.append(Fragment(local.name, kind, part.start, flat, local.data_axes))
        return found

    def masters(self) -> list[Fragment]:
        return [fragment for fragment in self.fragments() if fragment.kind == "master"]

    def masters_changed(self) -> None:
        for master, flat, group in zip(self.master_parts, self.flats, self.state.groups, strict=True):
            flat.narrow(0, group.rank * group.part, group.part).copy_(master)
        self._gather()

    def restored(self, steps: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)
        self.masters_changed()
