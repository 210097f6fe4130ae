"""Measure what the guards of a training cost: the share of a step's time.

    python tools/bench_guard.py                                             # tests/configs/tiny.yaml on 2 ranks
    python tools/bench_guard.py --config examples/configs/digits.yaml --ranks 4 --rounds 40 --json guards.json

Every guard takes turns with its absence, round after round, so that a machine that slows down slows both: a round is a
few steps without and as many with it, and the guard's cost is the difference within a round.

  step        seconds of a step without a guard: median over the rounds
  cost        microseconds that a step is longer with it: median and quartiles over the rounds
  share       cost over step, in percent
  processor   the same of the processor time that the first process uses, in percent: on a machine that others use, this
              tells more

  watchdog    heartbeats, progress, the collectives' record
  finite      a look at all gradients before they are summed, in every step
  spikes      robust z-scores of loss and gradient norm, in every step
  checksums   replicas of all parameters compared once in a round of steps

To measure another guard, add it to GUARDS, with what it is compared with: context managers that are entered on every
rank for the steps of a round and give what is called after each step.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megadit.parallel.replicas import differing_replicas
from megadit.runtime.launch import Process, process_group
from megadit.runtime.watchdog import Watchdog, WatchdogConfig
from megadit.training.build import Run, build_run, read_inputs
from megadit.training.config import check, load_config
from megadit.training.progress import Progress
from megadit.training.spikes import SpikeDetector
from megadit.training.step import Outcome, read, train_step
from megadit.zero import engine, reference

AfterStep = Callable[[Outcome, int], object]  # the second: steps that are left in the round
Guard = Callable[[Run, int], AbstractContextManager[AfterStep]]


@contextmanager
def nothing(run: Run, number: int) -> Iterator[AfterStep]:
    """What a step does by itself."""
    yield lambda outcome, left: None


@contextmanager
def watchdog(run: Run, number: int) -> Iterator[AfterStep]:
    """The watchdog over ranks; `number` keeps its keys apart from those of its other lives."""
    connect = run.process.meeting.connect
    meeting = replace(run.process.meeting, connect=lambda: dist.PrefixStore(f"bench/{number}", connect()))
    with Watchdog(replace(run.process, meeting=meeting)) as dog:
        dog.watch(WatchdogConfig(), Path(tempfile.gettempdir()), lambda *words, **more: None)
        yield lambda outcome, left: dog.progress(outcome.progress.step)


@contextmanager
def unlooked(run: Run, number: int) -> Iterator[AfterStep]:
    """Nobody looks whether gradients are finite."""
    looks = [module.all_finite for module in (reference, engine)]
    reference.all_finite = engine.all_finite = lambda tensors, like: torch.ones_like(like, dtype=torch.bool)
    try:
        yield lambda outcome, left: None
    finally:
        reference.all_finite, engine.all_finite = looks


@contextmanager
def spikes(run: Run, number: int) -> Iterator[AfterStep]:
    """A detector with a full window, as it is after the first steps of a training."""
    detector = SpikeDetector(threshold=1e9, window=run.config.guard.window)
    for i in range(run.config.guard.window):
        detector.look(1 + i % 7, 1 + i % 5)
    yield lambda outcome, left: detector.look(outcome.loss, outcome.grad_norm)


@contextmanager
def checksums(run: Run, number: int) -> Iterator[AfterStep]:
    """Replicas compared after the last step of a round."""

    def compare(outcome: Outcome, left: int) -> None:
        if left == 0:
            assert differing_replicas(run.named, run.grid) == []

    yield compare


GUARDS: dict[str, tuple[Guard, Guard]] = {  # without it, with it
    "watchdog": (nothing, watchdog),
    "finite": (unlooked, nothing),
    "spikes": (nothing, spikes),
    "checksums": (nothing, checksums),
}


@dataclass(frozen=True)
class Setting:
    """A configuration, the number of processes, and how much is measured."""

    config: str
    ranks: int
    rounds: int
    steps: int


@dataclass(frozen=True)
class Row:
    """One guard, on rank 0: a step's seconds, and processor seconds, in each round, without and with it."""

    name: str
    without: list[list[float]]
    guarded: list[list[float]]

    def costs(self, kind: int) -> tuple[float, list[float]]:
        """(the median step without the guard, what each round's is longer with it), of seconds or processor seconds."""
        pairs = zip(self.without, self.guarded, strict=True)
        return median(each[kind] for each in self.without), [after[kind] - before[kind] for before, after in pairs]

    def text(self) -> str:
        step, costs = self.costs(0)
        used, used_more = self.costs(1)
        low, middle, high = quantiles(costs, n=4)
        return (
            f"{self.name:<12} {step * 1e3:9.2f} ms {middle * 1e6:8.0f} us [{low * 1e6:.0f}, {high * 1e6:.0f}]"
            f" {100 * middle / step:7.2f} % {100 * median(used_more) / used:8.2f} %"
        )


def contest(setting: Setting, process: Process) -> list[Row]:
    """Every guard's row. Collective."""
    config = load_config(setting.config, [f"run.dir={tempfile.gettempdir()}/bench_guard"])
    run = build_run(config, check(config, process.world_size), read_inputs(config), process)
    progress, number = Progress(), 0

    def timed(guard: Guard) -> list[float]:
        nonlocal progress, number
        number += 1
        with guard(run, number) as after_step:
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            for left in reversed(range(setting.steps)):
                outcome = train_step(run, progress)
                read(run, [outcome.unread])
                progress = outcome.progress
                after_step(outcome, left)
            dist.barrier()
            seconds, used = time.perf_counter() - began, time.process_time() - used
            return [seconds / setting.steps, used / setting.steps]

    rows = [Row(name, [], []) for name in GUARDS]
    timed(nothing)  # caches, allocations
    for turn in range(setting.rounds):
        for row in rows:
            ways = list(zip(GUARDS[row.name], (row.without, row.guarded), strict=True))
            for guard, seconds in ways if turn % 2 == 0 else reversed(ways):
                seconds.append(timed(guard))
    return rows


def run_rank(rank: int, setting: Setting, port: int, out: str) -> None:
    """One of the processes; the first one writes what was measured to `out`."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    with process_group() as process:
        rows = contest(setting, process)
        if rank == 0:
            Path(out).write_text(json.dumps([asdict(row) for row in rows]))


def measure(setting: Setting) -> list[Row]:
    """`contest` on as many new processes as the setting says."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        multiprocessing.spawn(run_rank, (setting, port, str(out)), nprocs=setting.ranks)
        return [Row(**row) for row in json.loads(out.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tests/configs/tiny.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="of one round, each way")
    parser.add_argument("--json", help="write what was measured to this file")
    args = parser.parse_args()
    setting = Setting(args.config, args.ranks, args.rounds, args.steps)
    rows = measure(setting)
    print(f"{setting.ranks} ranks, {setting.rounds} rounds of {setting.steps} steps each way, {setting.config}")
    print(f"{'guard':<12} {'step':>12} {'cost [quartiles]':>20} {'share':>10} {'processor':>10}")
    for row in rows:
        print(row.text())
    if args.json:
        Path(args.json).write_text(json.dumps({"setting": asdict(setting), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
