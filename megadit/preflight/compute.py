"""No rank computes slower than the others: matrix products, then a training step that each rank makes alone.

Nobody waits for anybody within what is timed, so a slow rank's time is its own. All ranks are timed at once, as a
training has them: what shares power, cores or memory with its neighbours shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist

from megadit.checkpoint import Saver
from megadit.parallel.layout import ParallelConfig
from megadit.preflight.station import Station
from megadit.preflight.training import EXACT, OwnGrid, assembled, configuration
from megadit.preflight.verdict import Verdict
from megadit.training.build import read_inputs
from megadit.training.progress import Progress
from megadit.training.step import train_step

PRODUCTS = "matrix products"
STEP = "a training step alone"


def products(station: Station) -> Callable[[], None]:
    """Some matrix products, as the device likes them."""
    device = station.process.device
    width, count, dtype = (4096, 20, torch.bfloat16) if station.on_gpu else (256, 10, torch.float32)
    a = torch.full((width, width), 1 / width, dtype=dtype, device=device)

    def work() -> None:
        b = a
        for _ in range(count):
            b = a @ b

    return work


def step_alone(station: Station) -> Callable[[], None]:
    """Steps of a small model by this rank alone."""
    config = configuration((ParallelConfig(),), 1, None, EXACT, steps=1000)
    grid = OwnGrid()
    saver = Saver(config.directory)
    run = assembled(config, grid, read_inputs(config), station.process, saver)
    steps = iter(range(config.run.steps))
    return lambda: void(train_step(run, Progress(step=next(steps))))


def void(_: object) -> None:
    """Drop a result."""


def timed(station: Station, work: Callable[[], None]) -> list[float]:
    """Seconds of the work, a median for each round; all ranks begin each repeat together."""
    work()
    rounds = []
    for _ in range(station.settings.rounds):
        seconds = []
        for _ in range(station.settings.repeats):
            station.synchronise()
            dist.barrier()
            begin = time.perf_counter()
            work()
            station.synchronise()
            seconds.append(time.perf_counter() - begin)
        rounds.append(median(seconds))
    return rounds


def measure(station: Station) -> dict[str, list[float]]:
    found = {}
    for name, make in ((PRODUCTS, products), (STEP, step_alone)):
        station.mark(name)
        found[name] = timed(station, make(station))
    return found


def slowness(rounds_of: list[list[float]]) -> list[float]:
    """How many times longer each one took than the median, in the round in which it did best by that.

    >>> slowness([[1.0, 1.0], [1.0, 5.0], [2.0, 3.0], [1.0, 1.0]])
    [1.0, 1.0, 2.0, 1.0]
    """
    usual = [median_low(times) for times in zip(*rounds_of, strict=True)]
    return [min(mine / theirs for mine, theirs in zip(rounds, usual, strict=True)) for rounds in rounds_of]


def judge(station: Station, found: list[Any]) -> Verdict:
    verdict, words = Verdict(figures=found), []
    for name in (PRODUCTS, STEP):
        rounds_of = [each[name] for each in found]
        usual = median(median(rounds) for rounds in rounds_of)
        factors = slowness(rounds_of)
        words.append(f"{name} {usual * 1000:.1f} ms (slowest {max(factors):.2f} x)")
        verdict.faults += [
            f"{station.names([rank])} is slow: {name} took {median(rounds_of[rank]) * 1000:.1f} ms, at least "
            f"{factor:.2f} times the median of all ranks in each of {len(rounds_of[rank])} rounds"
            for rank, factor in enumerate(factors)
            if factor > station.settings.slow_factor
        ]
    verdict.summary = ", ".join(words)
    return verdict
