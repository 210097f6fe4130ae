"""Every layout of a model on a cluster: the ones that fit, the fastest first, and why the others do not."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, product
from multiprocessing import get_context
from typing import Literal

from megadit.parallel.layout import ParallelConfig
from megadit.planning.hardware import SPARE, Gpu
from megadit.planning.memory import GB
from megadit.planning.plan import Plan, Planner
from megadit.planning.simulation import fake_world
from megadit.training.config import RunConfig, check

MICRO_BATCHES = (1, 2, 4, 8)  # and the configuration's own
DEEPEST = 16  # pipeline ranks
EXACT = 24  # of the best, that are planned once more without sharing what is measured


@dataclass(frozen=True)
class Candidate:
    """A layout with the options that go with it; `reason`: why it cannot be taken, or what it would have been."""

    config: RunConfig
    plan: Plan | None
    reason: str = ""

    def __str__(self) -> str:
        parallel, data = self.config.parallel, self.config.data
        sequence = " sequence" if parallel.sequence else ""
        return (
            f"tp {parallel.tensor}{sequence} pp {parallel.pipeline} {parallel.schedule} ep {parallel.expert} "
            f"micro_batch {data.micro_batch} recompute {self.config.run.recompute}"
        )


def divisors(number: int) -> list[int]:
    """Ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [size for size in range(1, number + 1) if number % size == 0]


def candidates(config: RunConfig, world_size: int, gpu: Gpu) -> list[RunConfig]:
    """Configurations that differ from this one in their layout, schedule and microbatch, and recompute nothing.

    Tensor parallelism stays within a node, and cuts the tokens too where it cuts anything.
    """
    tensors = [size for size in divisors(world_size) if size <= gpu.gpus_per_node]
    micro_batches = sorted({*MICRO_BATCHES, config.data.micro_batch} - {0})
    found = []
    for tensor, pipeline in product(tensors, divisors(world_size)):
        if world_size % (tensor * pipeline) or pipeline > min(config.model.layers, DEEPEST):
            continue
        experts = divisors(world_size // (tensor * pipeline)) if config.model.has_experts else [1]
        schedules: tuple[Literal["1f1b", "interleaved", "zbv"], ...] = ("1f1b", "interleaved", "zbv")
        for expert, schedule in product(experts, schedules[: 1 if pipeline == 1 else 3]):
            if expert * tensor > max(1, config.model.experts):
                continue
            parallel = ParallelConfig(tensor, pipeline, expert, tensor > 1, schedule)
            for micro_batch in micro_batches:
                data = replace(config.data, micro_batch=micro_batch)
                run = replace(config.run, recompute="none")
                found.append(replace(config, parallel=parallel, run=run, data=data))
    return found


def with_more_recomputed(config: RunConfig) -> RunConfig | None:
    """The configuration that trades the next portion of time for memory, if its schedule allows."""
    steps: dict[str, Literal["moe", "block"]] = {"none": "moe", "moe": "block"}
    if config.parallel.schedule == "zbv" or config.run.recompute not in steps:
        return None
    step = steps[config.run.recompute] if config.model.has_experts else "block"
    return replace(config, run=replace(config.run, recompute=step))


def search(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    spare: float = SPARE,
    processes: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Candidate]:
    """All candidates: first those that fit and leave `spare` of the memory, the fastest first; then the others.

    What does not fit is tried again with the experts recomputed, then with whole blocks: more than that costs time and
    buys nothing. Plans are coarse (see `Planner`), but for the best ones. `processes`: that share the work (0: one for
    each core).
    """
    found: list[Candidate] = []
    done = 0
    # Without gc: it would look through the long orders of schedules again and again, for a third of the time.
    context, processes = get_context("fork"), processes or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processes, mp_context=context, initializer=gc.disable) as pool:
        wanted = candidates(config, world_size, gpu)
        while wanted:
            # Those that share what is measured of a layer go to the same process.
            batches = [list(batch) for _, batch in groupby(sorted(wanted, key=_shared), key=_shared)]
            jobs = [pool.submit(evaluate, batch, world_size, gpu, spare, True) for batch in batches]
            tried: list[Candidate] = []
            for job in jobs:
                tried += job.result()
                done += 1
                progress(done, done + len(jobs) - jobs.index(job))
            found += tried
            short = [candidate.config for candidate in tried if candidate.plan is not None and candidate.reason]
            wanted = [more for more in map(with_more_recomputed, short) if more is not None]
        found.sort(key=_order)
        best = sorted((candidate.config for candidate in found[:EXACT] if not candidate.reason), key=_alike)
        batches = [list(batch) for _, batch in groupby(best, key=_alike)]
        jobs = [pool.submit(evaluate, batch, world_size, gpu, spare, False) for batch in batches]
        again = [candidate for job in jobs for candidate in job.result()]
    return sorted(again, key=_order) + found[len(best) :]


def _shared(config: RunConfig) -> tuple[int, bool, int, str]:
    """Layouts with the same cost a layer the same, if experts are spread as widely as they can be."""
    return config.parallel.tensor, config.parallel.expert > 1, config.data.micro_batch, config.run.recompute


def _alike(config: RunConfig) -> tuple[object, ...]:
    """Layouts with the same cost a layer the same."""
    return config.parallel.expert, *_shared(config)


def _order(candidate: Candidate) -> tuple[bool, float]:
    plan = candidate.plan
    if plan is None:
        return True, float("inf")
    return bool(candidate.reason), plan.peak if candidate.reason else plan.seconds


def evaluate(configs: Sequence[RunConfig], world_size: int, gpu: Gpu, spare: float, coarse: bool) -> list[Candidate]:
    """Plans of several configurations, in one process."""
    with fake_world(0, world_size):
        planner = Planner(gpu, coarse)
        return [_evaluate(planner, config, world_size, spare) for config in configs]


def _evaluate(planner: Planner, config: RunConfig, world_size: int, spare: float) -> Candidate:
    try:
        layout = check(config, world_size)
    except ValueError as error:
        return Candidate(config, None, str(error))
    room = (1 - spare) * planner.gpu.memory_bytes
    state = planner.state(config, layout)
    if state > room:
        return Candidate(config, None, f"parameters and optimizer alone take {state / GB:.1f} GB")
    plan = planner.plan(config, layout)
    return Candidate(config, plan, does_not_fit(plan, spare))


def does_not_fit(plan: Plan, spare: float) -> str:
    """By how much and on which rank the plan takes more memory than there is, or nothing."""
    fullest = max(plan.ranks, key=lambda rank: rank.memory.peak)
    room = (1 - spare) * plan.gpu.memory_bytes
    if fullest.memory.peak <= room:
        return ""
    largest = max(fullest.memory.__annotations__, key=lambda name: getattr(fullest.memory, name))
    layers = " and ".join(f"{stage.start} to {stage.stop - 1}" for stage in fullest.layers)
    return (
        f"pipeline rank {fullest.rank} (layers {layers}) takes {fullest.memory.peak / GB:.1f} GB, "
        f"{(fullest.memory.peak - room) / GB:.1f} GB more than {room / GB:.1f} GB "
        f"({plan.gpu.memory_bytes / GB:.0f} GB less {spare:.0%}); most of it are {largest}, "
        f"{getattr(fullest.memory, largest) / GB:.1f} GB"
    )


def nearest(plan: Plan, found: Sequence[Candidate]) -> Candidate | None:
    """Of the layouts that fit, the one in which the fewest settings differ from the plan's; the fastest of those."""
    fitting = [candidate for candidate in found if candidate.plan is not None and not candidate.reason]
    return min(fitting, key=lambda candidate: len(list(differences(plan.config, candidate.config))), default=None)


def differences(config: RunConfig, other: RunConfig) -> Iterator[str]:
    """The overrides that make one configuration the other."""
    mine, theirs = config.to_dict(), other.to_dict()
    for section in ("parallel", "run", "data"):
        for key, value in theirs[section].items():
            if mine[section][key] != value:
                yield f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
