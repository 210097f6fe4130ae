"""What one microbatch costs a pipeline stage on one rank, without running the whole stage.

A small stage of the model's own modules, with one block of each kind, runs once on the meta device, and once more for
each kind with a second block of it. A longer stage differs from the small one by so many times the difference. So a
plan takes a moment where a dry run takes seconds, and a change of the model changes both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from megadit.diffusion.objective import velocity_loss
from megadit.model.block import Block
from megadit.model.config import ECDiTConfig
from megadit.model.ecdit import ECDiT, carry_like
from megadit.model.embed import Embedding, Head
from megadit.parallel.grid import Grid
from megadit.planning.meter import Collective, Meter, Operation, fused_attention
from megadit.planning.simulation import META, blank_condition, output_like
from megadit.training.build import region_of
from megadit.training.config import RunConfig, images_per_group, training_tokens


@dataclass
class Phase:
    """A forward pass, a backward pass, or one of the halves that a schedule may split it into.

    peak: most bytes alive at once, above what was alive before the microbatch's forward pass; gradients of parameters
    are not among them.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    peak: int = 0

    def plus(self, times: int, more: Phase, less: Phase, kept: int) -> Phase:
        """This phase and `times` the difference of two others; the peak rises by what is `kept` meanwhile."""
        return Phase(
            _plus(self.operations, times, more.operations, less.operations),
            _plus(self.collectives, times, more.collectives, less.collectives),
            self.peak + times * kept,
        )


@dataclass
class Costs:
    """Of one microbatch in one stage on one rank.

    phases: "F", "B" (with a forward that is run again), or the halves "I" and "W". saved: bytes that the forward pass
    leaves until the backward pass is done, the stage's output among them. held: bytes that the first half leaves for
    the second.
    """

    phases: dict[str, Phase]
    saved: int
    held: int

    def in_second_half(self) -> Costs:
        """As a schedule that splits backward passes takes stage 0: nothing came into it, so "W" is the whole of it."""
        phases = {"F": self.phases["F"], "I": Phase(peak=self.saved), "W": self.phases["B"]}
        return Costs(phases, self.saved, self.held)

    def plus(self, times: int, more: Costs, less: Costs) -> Costs:
        """These costs and `times` the difference of two others."""
        saved, held = more.saved - less.saved, more.held - less.held
        kept = {"F": saved, "B": saved, "I": saved + held, "W": saved + held}
        return Costs(
            {
                name: phase.plus(times, more.phases[name], less.phases[name], kept[name])
                for name, phase in self.phases.items()
            },
            self.saved + times * saved,
            self.held + times * held,
        )


def _plus(base: Counter[Any], times: int, more: Counter[Any], less: Counter[Any]) -> Counter[Any]:
    total = Counter(base)
    for key in more.keys() | less.keys():
        total[key] += times * (more[key] - less[key])
    return Counter({key: count for key, count in total.items() if count})


class Profiler:
    """Costs of stages for one configuration of the network, one grid and one size of microbatch.

    Needs a process group (`simulation.fake_world`). What is measured is kept.
    """

    def __init__(self, config: RunConfig, grid: Grid, images: int) -> None:
        """`images`: of a microbatch."""
        self.config, self.grid, self.images = config, grid, images
        self.model = replace(config.model, routing_group=images_per_group(config))
        self.region, self.tokens = region_of(config, grid), training_tokens(config)
        self._measured: dict[tuple[Any, ...], Costs] = {}

    def stage(self, layers: Sequence[int], splits: bool) -> Costs:
        """Costs of the stage that holds these layers; `splits`: its backward pass comes in halves."""
        first, last = layers[0] == 0, layers[-1] == self.model.layers - 1
        if first and splits:
            return self.stage(layers, splits=False).in_second_half()
        kinds = [kind_of(self.model, layer) for layer in layers]
        once = tuple(dict.fromkeys(kinds))
        costs = self._measure(once, first, last, splits)
        for kind, count in Counter(kinds).items():
            if count > 1:
                twice, alone = (self._measure(blocks, False, False, splits) for blocks in ((kind, kind), (kind,)))
                costs = costs.plus(count - 1, twice, alone)
        if splits:
            return costs
        peaks = {name: max(self._peak(name, kind, kinds, first, last) for kind in once) for name in costs.phases}
        return replace(costs, phases={name: replace(costs.phases[name], peak=peak) for name, peak in peaks.items()})

    def _peak(self, name: str, kind: Kind, kinds: list[Kind], first: bool, last: bool) -> int:
        """Most bytes alive in the last block of a kind: there, all that comes before it has saved what it saves."""
        peak = self._measure((kind,), False, last, False).phases[name].peak
        if first:
            peak += self._saved((kind,), True) - self._saved((kind,), False)
        for other, count in Counter(kinds[: len(kinds) - 1 - kinds[::-1].index(kind)]).items():
            peak += count * (self._saved((other, other)) - self._saved((other,)))
        return peak

    def _saved(self, kinds: tuple[Kind, ...], first: bool = False) -> int:
        return self._measure(kinds, first, False, False).saved

    def _measure(self, kinds: tuple[Kind, ...], first: bool, last: bool, splits: bool) -> Costs:
        key = (kinds, first, last, splits)
        if key not in self._measured:
            with fused_attention():
                self._measured[key] = self._run(self._build(kinds, first, last), first, last, splits)
        return self._measured[key]

    def _build(self, kinds: tuple[Kind, ...], first: bool, last: bool) -> ECDiT:
        """A stage of one block for each of `kinds`."""
        model, config = self.model, self.config
        recompute = config.run.recompute
        with META:
            stage = ECDiT(model, config.text, range(1, 1), self.region, self.grid["ep"], recompute)
            for place, (_, _, _, layer) in enumerate(kinds):
                stage.blocks[str(place)] = Block(
                    model, config.text.width, layer, self.region, self.grid["ep"], recompute == "moe"
                )
            stage.embed = Embedding(model, config.text, self.region) if first else None
            stage.head = Head(model, self.region) if last else None
        return stage.to(META, config.dtype)

    def _run(self, stage: ECDiT, first: bool, last: bool, splits: bool) -> Costs:
        """One microbatch forward and backward."""
        model, dtype = self.model, self.config.dtype
        meter, parameters = Meter(self.grid, META), list(stage.parameters())
        size = model.image_size
        with META:
            image = torch.empty(self.images, model.channels, size, size, dtype=dtype)
            exact = torch.promote_types(dtype, torch.float32)
            keywords: dict[str, Any] = {"timesteps_B": torch.empty(self.images, dtype=exact), "size": (size, size)}
            keywords |= {key: value.to(META) for key, value in blank_condition(self.config, self.images).items()}
            target = output_like(self.config, image).to(exact)
            if self.tokens < model.tokens:
                keywords["kept_BT"] = torch.empty(self.images, self.tokens, dtype=torch.int64)
        carry = (image,) if first else carry_like(model, self.config.text, image, self.region, self.tokens)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: meter.claim("gradients", [p.grad]))
        if first or model.positions == "rotary":
            with torch.no_grad():
                stage(*carry, **keywords)  # makes the positions, which stay: no microbatch's cost
        with meter:
            meter.claim("inputs", [*carry, image, target, *(t for t in keywords.values() if isinstance(t, Tensor))])
            meter.claim("weights", parameters)
            before = _Watch(meter)
            output = stage(*carry, **keywords)
            outputs = list(output) if isinstance(output, tuple) else [output]
            if last:
                outputs = [self._loss(outputs, target)]
            forward, saved = before.phase(), before.left()
            grads = None if last else [torch.empty_like(part) for part in outputs]
            meter.claim("inputs", grads or [])
            phases, held = {"F": forward}, 0
            if splits:
                dinputs, groups = stage_backward_input(outputs, grads, list(carry), iter(parameters))
                phases["I"] = before.phase()
                del dinputs
                for tensor in carry:
                    tensor.grad = None
                held = before.left() - saved
                stage_backward_weight(iter(parameters), groups)
                phases["W"] = before.phase()
            else:
                # A balance loss is a plain zero up to the first experts.
                wanted = [i for i, part in enumerate(outputs) if part.requires_grad]
                torch.autograd.backward(
                    [outputs[i] for i in wanted], None if grads is None else [grads[i] for i in wanted]
                )
                phases["B"] = before.phase()
        return Costs(phases, saved, held)

    def _loss(self, outputs: list[Tensor], target: Tensor) -> Tensor:
        loss = velocity_loss(outputs[0], target).sum() / self.images
        return loss if len(outputs) == 1 else loss + outputs[1].sum()


Kind = tuple[bool, float, bool, int]


def kind_of(model: ECDiTConfig, layer: int) -> Kind:
    """Layers of one kind cost the same: (has experts, their capacity factor, has an embedder, such a layer)."""
    is_moe, embeds = model.is_moe(layer), model.embedders == "per_layer" and layer > 0
    factor = model.capacity_factor_of(layer) if is_moe else 0.0
    alike = (
        other
        for other in range(model.layers)
        if model.is_moe(other) == is_moe
        and (model.embedders == "per_layer" and other > 0) == embeds
        and (not is_moe or model.capacity_factor_of(other) == factor)
    )
    return is_moe, factor, embeds, next(alike)


class _Watch:
    """Takes what a meter counted since the last time; bytes of activations are above what they were at first."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.base = meter, meter.live["activations"]
        meter.take_peaks()

    def left(self) -> int:
        return self.meter.live["activations"] - self.base

    def phase(self) -> Phase:
        peak = self.meter.take_peaks().of["activations"] - self.base
        phase = Phase(Counter(self.meter.operations), Counter(self.meter.collectives), peak)
        self.meter.operations.clear()
        self.meter.collectives.clear()
        return phase
