"""What a layout needs and how long a step takes, without running it: memory, communication, time of each pipeline rank.

Ranks of one pipeline rank hold the same amounts, so the plan has a row for each pipeline rank: the rank whose other
coordinates are 0, which no other one exceeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial

import torch

from megadit.model.config import ECDiTConfig
from megadit.model.count import flops_of, products_of, stage_costs, weights_of
from megadit.parallel.grid import UNIONS, Grid
from megadit.parallel.layout import AXES, Layout
from megadit.parallel.pipeline.partition import partition, stage_indices
from megadit.planning.hardware import Gpu
from megadit.planning.memory import Memory
from megadit.planning.meter import Collective
from megadit.planning.profile import Costs, Profiler
from megadit.planning.schedule import Kind, Program, Timeline
from megadit.planning.simulation import blank_condition, carries
from megadit.planning.timing import members_per_node, seconds_of, seconds_of_collective, utilisation
from megadit.planning.update import update_of
from megadit.training.config import RunConfig, images_per_group, num_microbatches, training_tokens
from megadit.training.step import SCALARS
from megadit.zero.footprint import LocalParameter, WholeState, ZeroState, state_of

SAMPLES = 800_000 * 4096  # of EC-DiT's training (arXiv 2410.02098)


@dataclass(frozen=True)
class RankPlan:
    """One pipeline rank: its stages' layers, elements of its parameters, bytes, and what it sends in a step.

    transfer_seconds: of all that it sends to its pipeline neighbours and receives from them. update_seconds: of
    reducing gradients, updating, gathering.
    """

    rank: int
    layers: list[range]
    parameters: int
    memory: Memory
    collectives: Counter[Collective]
    transfer_seconds: float
    update_seconds: float


@dataclass(frozen=True)
class Plan:
    """One layout on given hardware."""

    config: RunConfig
    layout: Layout
    gpu: Gpu
    ranks: list[RankPlan]
    timeline: Timeline
    durations: dict[tuple[int, str], tuple[float, float]]  # (stage, kind): seconds of kernels and of collectives
    groups: dict[str, tuple[int, int]]  # of an axis: size of its groups, and how many of their ranks a node has
    carry: list[int]  # bytes of each tensor that a stage hands the next, of one microbatch

    @property
    def world_size(self) -> int:
        return self.layout.pp * self.layout.dp * self.layout.tp

    @property
    def model(self) -> ECDiTConfig:
        """With the number of images of a routing group."""
        return replace(self.config.model, routing_group=images_per_group(self.config))

    @property
    def tokens(self) -> int:
        """That the network sees of an image in training."""
        return training_tokens(self.config)

    @property
    def num_microbatches(self) -> int:
        return num_microbatches(self.config, self.layout)

    @property
    def micro_batch(self) -> int:
        """Images."""
        return self.config.data.global_batch // self.layout.dp // self.num_microbatches

    @cached_property
    def flops(self) -> int:
        """Of the model, for one optimizer step, forward and backward; nothing that is run again."""
        images = self.model.group_images
        counted = flops_of(products_of(self.model, self.config.text, images, tokens=self.tokens), fused=False)
        return (counted.forward + counted.backward) * self.config.data.global_batch // images

    def is_within_node(self, axis: str) -> bool:
        size, per_node = self.groups[axis]
        return size == per_node

    @property
    def peak(self) -> int:
        """Bytes on the fullest rank."""
        return max(rank.memory.peak for rank in self.ranks)

    @property
    def headroom(self) -> float:
        """The part of a GPU's memory that stays free; below 0 the plan does not fit."""
        return 1 - self.peak / self.gpu.memory_bytes

    @property
    def update_seconds(self) -> float:
        """Reducing gradients, updating, gathering."""
        return max(rank.update_seconds for rank in self.ranks)

    @property
    def seconds(self) -> float:
        """Of one optimizer step.

        The time that the pipeline takes when every rank has what it needs for itself, or, where ranks share cores, the
        time that the cores take for the work of them all: while a rank waits, another one computes.
        """
        return max(self.timeline.total + self.update_seconds, self.shared_seconds)

    @property
    def shared_seconds(self) -> float:
        """Seconds of one step in which a node's cores do the work of all its ranks, collectives too: on CPUs those are
        nothing but work. 0 where every rank has a device of its own.
        """
        if not self.gpu.cores:
            return 0.0
        work = sum(self.timeline.busy) + sum(rank.transfer_seconds + rank.update_seconds for rank in self.ranks)
        return self.gpu.slowdown(min(self.gpu.gpus_per_node, self.world_size)) * work / len(self.ranks)

    @property
    def terms(self) -> dict[str, float]:
        """What the seconds of a step are made of, on the busiest pipeline rank; the third is what it waits, for others
        of the pipeline or for a core.
        """
        program, busy = self.timeline.program, self.timeline.busy
        stages = program.stages[busy.index(max(busy))]
        taken = [seconds for (stage, _), seconds in self.durations.items() if stage in stages]
        kernels, collectives = (self.num_microbatches * sum(parts) for parts in zip(*taken, strict=True))
        return {
            "kernels": kernels,
            "collectives of layers": collectives,
            "pipeline bubble and transfers": self.seconds - self.update_seconds - kernels - collectives,
            "reduction and update": self.update_seconds,
        }

    @property
    def mfu(self) -> float:
        return utilisation(self.flops, self.seconds, self.world_size, self.gpu, self.config.run.dtype)

    @property
    def images_per_second(self) -> float:
        return self.config.data.global_batch / self.seconds


class Planner:
    """Plans layouts of one world. Needs a process group of that size (`simulation.fake_world`)."""

    def __init__(self, gpu: Gpu, coarse: bool = False) -> None:
        """`coarse`: measure layers with experts spread as widely as they can be, whatever the layout: the memory is the
        same, the time a little less where they are not, and many layouts share what is measured.
        """
        self.gpu, self.coarse = gpu, coarse
        self._profilers: dict[object, Profiler] = {}

    def plan(self, config: RunConfig, layout: Layout) -> Plan:
        """The plan of a configuration for which `training.config.check` gave this layout."""
        return _Planning(config, layout, self.gpu, self._profiler(config, layout)).plan()

    def state(self, config: RunConfig, layout: Layout) -> int:
        """Bytes of parameters, gradients and optimizer on the rank that has most of them: known in no time."""
        shares = _Shares(config, layout)
        footprints = [shares.engine(rank).footprint(turns=()) for rank in range(layout.pp)]
        return max(footprint.state + footprint.gradients for footprint in footprints)

    def _profiler(self, config: RunConfig, layout: Layout) -> Profiler:
        """One for all layouts in which a microbatch costs a block the same."""
        images = config.data.global_batch // layout.dp // num_microbatches(config, layout)
        world = layout.pp * layout.dp * layout.tp
        expert = math.gcd(config.model.experts // layout.tp, world // layout.tp) if self.coarse else layout.ep
        expert = layout.ep if layout.ep == 1 else expert
        network, seen = repr(config.model), training_tokens(config)
        key = (layout.tp, expert, config.parallel.sequence, images, config.run, config.text, network, seen)
        if key not in self._profilers:
            alike = Layout(pp=1, edp=world // (expert * layout.tp), ep=expert, tp=layout.tp)
            self._profilers[key] = Profiler(config, Grid(alike, 0), images)
        return self._profilers[key]


class _Engine:
    """What a rank's engine holds, sends and computes, each reckoned once."""

    def __init__(self, state: WholeState | ZeroState, chunks: int) -> None:
        """`chunks`: pipeline stages of the rank."""
        self.state = state
        self.numel = sum(group.numel for group in state.groups)
        self.of_microbatch = Counter(call for chunk in range(chunks) for call in state.after_microbatch(chunk))
        self.at_the_end = Counter([*state.at_the_end(), *state.of_step()])
        self.footprint = cache(state.footprint)
        self.update = cache(partial(update_of, state))

    def collectives(self, microbatches: int) -> Counter[Collective]:
        """Of a step."""
        each = {call: count * microbatches for call, count in self.of_microbatch.items()}
        return Counter({Collective(*call): count for call, count in (self.at_the_end + Counter(each)).items()})


_engines: dict[object, _Engine] = {}  # layouts that differ in their microbatches alone share one


_partition = cache(partition)
_program = lru_cache(maxsize=4)(Program)  # a long one takes a second, and tens of MB


@dataclass(frozen=True)
class _Shares:
    """Who holds which layers and parameters: all that is known without running anything."""

    config: RunConfig
    layout: Layout

    @cached_property
    def model(self) -> ECDiTConfig:
        return replace(self.config.model, routing_group=images_per_group(self.config))

    @property
    def num_microbatches(self) -> int:
        return num_microbatches(self.config, self.layout)

    @cached_property
    def stages(self) -> list[range]:
        """The layers of every pipeline stage."""
        num_stages = self.config.parallel.pipeline * self.config.parallel.stages_on_rank
        costs = stage_costs(self.model, self.config.text, training_tokens(self.config))
        return list(_partition(tuple(costs), num_stages))

    @cached_property
    def indices(self) -> list[list[int]]:
        """The stages of every pipeline rank."""
        parallel = self.config.parallel
        ranks, held = parallel.pipeline, parallel.stages_on_rank
        return [stage_indices(parallel.schedule, rank, ranks, held) for rank in range(ranks)]

    def _parameters(self, stages: Sequence[range]) -> list[LocalParameter]:
        """This rank's parameters, in the order of its engine."""
        layout, sequence = self.layout, self.config.parallel.sequence
        return [
            LocalParameter(
                weight.name,
                weight.on_rank(layout.tp, layout.ep),
                ("edp",) if weight.kind.is_expert else ("edp", "ep"),
                weight.is_partial(sequence),
                weight.kind.decays,
                chunk,
            )
            for chunk, layers in enumerate(stages)
            for weight in weights_of(self.model, self.config.text, layers)
        ]

    @cached_property
    def _network(self) -> str:
        """Tells networks apart."""
        return f"{self.model!r} {self.config.text!r}"

    def engine(self, rank: int) -> _Engine:
        stages = tuple(self.stages[index] for index in self.indices[rank])
        config = self.config
        numbers = config.zero, config.run.dtype, config.optim.weight_decay, config.parallel.sequence
        key = self.layout, stages, rank, *numbers, self._network
        if key not in _engines:
            first = int(self.layout.ranks[rank].flatten()[0])
            parameters, decay = self._parameters(stages), config.optim.weight_decay
            state = state_of(config.zero.stage, parameters, config.dtype, self.layout, first, decay)
            _engines[key] = _Engine(state, len(stages))
        return _engines[key]


@dataclass(frozen=True)
class _Planning(_Shares):
    """One plan in the making."""

    gpu: Gpu
    profiler: Profiler

    @cached_property
    def costs(self) -> list[Costs]:
        """Of one microbatch in every stage."""
        splits = self.config.parallel.schedule == "zbv"
        return [self.profiler.stage(layers, splits) for layers in self.stages]

    @cached_property
    def program(self) -> Program:
        parallel = self.config.parallel
        return _program(parallel.schedule, parallel.pipeline, parallel.stages_on_rank, self.num_microbatches)

    def plan(self) -> Plan:
        durations = {
            (stage, kind): (self._compute(phase.operations), self._communicate(phase.collectives))
            for stage, costs in enumerate(self.costs)
            for kind, phase in costs.phases.items()
        }
        ran = self.program.timeline(
            lambda kind, stage: sum(durations[stage, kind]), lambda sender, receiver: self._transfer
        )
        ranks = [self._rank(rank) for rank in range(self.layout.pp)]
        return Plan(self.config, self.layout, self.gpu, ranks, ran, durations, self.groups, self._carry)

    # Time

    def _compute(self, operations: Counter) -> float:
        return seconds_of(operations, self.gpu, self.config.run.dtype)

    def _communicate(self, collectives: Counter[Collective]) -> float:
        return sum(count * self._seconds(*call) for call, count in collectives.items())

    def _seconds(self, axis: str, operation: str, nbytes: int) -> float:
        size, per_node = self.groups[axis]
        return seconds_of_collective(operation, nbytes, size, per_node, self.gpu)

    @cached_property
    def groups(self) -> dict[str, tuple[int, int]]:
        """Of the groups of an axis: their size, and how many of their ranks are on one node."""
        axes: dict[str, tuple[str, ...]] = {axis: (axis,) for axis in AXES} | UNIONS
        members = {name: self.layout.members(along, 0) for name, along in axes.items()}
        return {name: (len(ranks), members_per_node(ranks, self.gpu.gpus_per_node)) for name, ranks in members.items()}

    @cached_property
    def _transfer(self) -> float:
        """Seconds of the carry, or its gradient, from one pipeline rank to its neighbour."""
        size, per_node = self.groups["pp"]
        near = 2 if per_node == size else 1
        return sum(seconds_of_collective("send", part, 2, near, self.gpu) for part in self._carry)

    @cached_property
    def _carry(self) -> list[int]:
        """Bytes of each tensor that a stage hands the next."""
        between = carries(self.config, self.profiler.images, self.profiler.grid)[1]
        return [part.nbytes for part in between]

    def _transfers(self, rank: int) -> float:
        """Seconds in which a rank sends to its neighbours and receives from them."""
        return sum(
            2 * self.num_microbatches * self._transfer  # the carry one way, its gradient the other
            for index in self.indices[rank]
            for neighbour in self._neighbours(rank, index)
        )

    def _neighbours(self, rank: int, index: int) -> list[int]:
        """The stages beside this one of a rank that other ranks hold."""
        beside = (index - 1, index + 1)
        return [stage for stage in beside if 0 <= stage < len(self.stages) and stage not in self.indices[rank]]

    # Memory

    def _rank(self, rank: int) -> RankPlan:
        indices = self.indices[rank]
        engine = self.engine(rank)
        footprint = engine.footprint(self.program.turns[rank], foreach=self.gpu.cores == 0)
        sent = engine.collectives(self.num_microbatches) + self._report()
        memory = Memory(
            weights=footprint.weights,
            masters=footprint.masters,
            moments=footprint.moments,
            ema=footprint.ema,
            gradients=max(footprint.accumulating, footprint.gradients),
            activations=self._activations(rank) + self._batch() + self._positions(indices),
            buffers=self._buffers(indices),
            updating=max(footprint.reducing, footprint.updating),
        )
        return RankPlan(
            rank,
            [self.stages[index] for index in indices],
            engine.numel,
            memory,
            self._collectives(rank) + sent,
            self._transfers(rank),
            self._communicate(sent) + self._update(engine),
        )

    def _activations(self, rank: int) -> int:
        """The most during any action: what the others in flight keep, and what the running one needs."""
        carry, most = sum(self._carry), 0
        for moment in self.program.moments[rank]:
            running, is_second = self.costs[moment.stage], _is_second_half(moment.kind, moment.stage)
            there = running.phases[moment.kind].peak - running.saved - running.held * is_second
            for stage, (whole, weights) in moment.kept.items():
                costs = self.costs[stage]
                there += costs.saved * whole + (costs.saved + costs.held) * weights
            left = sum(self._left_by(*pair, rank) * count for pair, count in moment.before.items())
            most = max(most, there + carry * left)
        # Under 1f1b a gradient that was sent to the rank before stays until the next one is.
        return most + carry * (rank > 0 and self.config.parallel.schedule == "1f1b")

    def _left_by(self, kind: Kind, stage: int, rank: int) -> int:
        """How many carries' bytes stay to the end of the step once a stage's backward pass has run for a microbatch.

        Between two stages of one rank: the carry and its gradient. Under zbv: each gradient that a stage hands back.
        """
        own = self.indices[rank]
        if kind == "F" or _is_second_half(kind, stage) or (kind, stage) == ("I", 0):
            return 0
        gradient = stage - 1 in own or (self.config.parallel.schedule == "zbv" and stage > 0)
        return gradient + (stage + 1 in own)

    def _batch(self) -> int:
        """Noisy images, targets, times, captions and places of what is kept, of all microbatches."""
        config, images = self.config, self.config.data.global_batch // self.layout.dp
        exact = torch.promote_types(config.dtype, torch.float32).itemsize
        model, tokens = self.model, training_tokens(config)
        pixels, seen = (images * model.channels * model.patch**2 * count for count in (model.tokens, tokens))
        places = 8 * images * tokens if tokens < model.tokens else 0
        told = sum(tensor.nbytes for tensor in blank_condition(config, 1).values()) * images
        return pixels * config.dtype.itemsize + (seen + images) * exact + places + told

    def _positions(self, indices: Sequence[int]) -> int:
        """The first stage's, in float64; rotary ones every stage has, cosines and sines."""
        if self.model.positions == "rotary":
            return 2 * self.model.tokens * self.model.head_width * max(self.config.dtype.itemsize, 4)
        return 8 * self.model.tokens * self.model.width if 0 in indices else 0

    def _buffers(self, indices: Sequence[int]) -> int:
        """Places for every microbatch's carry and its gradient, of neighbours on other ranks."""
        last = len(self.stages) - 1
        # Stages of one rank hand the carry over without it.
        carry = sum(self._carry) * self.num_microbatches
        return sum(carry * ((index > 0) + (index < last)) for index in indices)

    # Communication

    def _collectives(self, rank: int) -> Counter[Collective]:
        """Of the stages, and between them."""
        total: Counter[Collective] = Counter()
        for index in self.indices[rank]:
            for phase in self.costs[index].phases.values():
                for call, count in phase.collectives.items():
                    total[call] += count * self.num_microbatches
            for _ in self._neighbours(rank, index):
                for nbytes in self._carry:
                    total[Collective("pp", "send", nbytes)] += self.num_microbatches
                    total[Collective("pp", "recv", nbytes)] += self.num_microbatches
        return total

    def _report(self) -> Counter[Collective]:
        """What a step tells all ranks: the loss and the routers' statistics."""
        world_size, itemsize = self.layout.ranks.numel(), max(self.config.dtype.itemsize, 4)
        routers = sum(self.model.is_moe(layer) for layer in range(self.model.layers))
        length = 1 + routers * (len(SCALARS) + self.model.experts)
        return Counter([Collective("world", "all-reduce", length * itemsize)] if world_size > 1 else [])

    def _update(self, engine: _Engine) -> float:
        """Seconds of what the engine computes."""
        update = engine.update(self.num_microbatches, foreach=self.gpu.cores == 0)
        memory = update.nbytes / (self.gpu.memory_bandwidth * self.gpu.efficiency.memory)
        return memory + update.kernels * self.gpu.efficiency.launch_seconds


def _is_second_half(kind: Kind, stage: int) -> bool:
    """Whether this is the end of a backward pass in halves."""
    return kind == "W" and stage > 0
