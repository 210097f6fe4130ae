"""Measure what the guards of a training cost: the share of a step's time.

    python tools/bench_guard.py                                             # tests/configs/tiny.yaml on 2 ranks
    python tools/bench_guard.py --config examples/configs/digits.yaml --ranks 4 --rounds 40 --json guards.json

Every guard takes turns with its absence, round after round, so that a machine that slows down slows both: a round is a
few steps without and as many with it. What a guard costs is told twice, of the first process: by a clock inside it, and
by the difference within a round. The first is exact for what is done on the host. The second sees everything, but only
what is larger than the machine's own noise: look at its quartiles.

  step        milliseconds of a step without a guard: median over the rounds
  inside      microseconds of a step that pass in the guard's own code: median over the rounds
  share       inside over step, in percent
  longer      percent of a step that a step is longer with the guard: median and quartiles over the rounds

The last line adds the shares of those that are there in every step.

  watchdog    heartbeats and progress; inside: the processor time of its two threads
  finite      a look at all gradients before they are summed, in every step
  spikes      robust z-scores of loss and gradient norm, in every step
  checksums   replicas of all parameters compared in every step; off by default, and then not in every step

To measure another guard, add it to GUARDS, with what it is compared with: context managers that are entered on every
rank for the steps of a round, count what passes inside on a stopwatch, and give what is called after each step.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import ParamSpec, TypeVar

from megadit.runtime.tool import refuse_early
from megadit.training.config import load_checked


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tests/configs/tiny.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="of one round, each way")
    parser.add_argument("--json", help="write what was measured to this file")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports below, which take seconds
    args = arguments()
    refuse_early("bench_guard", lambda: load_checked(args.config, [], args.ranks))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megadit.parallel.replicas import differing_replicas
from megadit.runtime.config import WatchdogConfig
from megadit.runtime.launch import Process, process_group
from megadit.runtime.watchdog import Watchdog
from megadit.training.build import Run, build_run, read_inputs
from megadit.training.config import check, load_config
from megadit.training.progress import Progress
from megadit.training.spikes import SpikeDetector
from megadit.training.step import Outcome, read, train_step
from megadit.zero import engine, reference

P = ParamSpec("P")
T = TypeVar("T")
AfterStep = Callable[[Outcome], object]
Guard = Callable[["Round"], AbstractContextManager[AfterStep]]


@dataclass
class Round:
    """A few steps of `run`; number: how many such there were; inside: seconds that passed in the guard's own code."""

    run: Run
    number: int
    inside: float = 0.0

    def clocked(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, with its seconds added to `inside`."""

        def clocked(*args: P.args, **kwargs: P.kwargs) -> T:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += time.perf_counter() - began

        return clocked


@contextmanager
def nothing(this: Round) -> Iterator[AfterStep]:
    """What a step does by itself."""
    yield lambda outcome: None


@contextmanager
def watchdog(this: Round) -> Iterator[AfterStep]:
    """The watchdog over ranks; the round's number keeps its keys apart from those of its other lives."""
    process = this.run.process
    connect = process.meeting.connect
    meeting = replace(process.meeting, connect=lambda: dist.PrefixStore(f"bench/{this.number}", connect()))
    with Watchdog(replace(process, meeting=meeting)) as dog:
        dog.watch(WatchdogConfig(), Path(tempfile.gettempdir()), lambda *words, **more: None)
        yield this.clocked(lambda outcome: dog.progress(outcome.progress.step))
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("watchdog ")]
        assert len(threads) == 2
        this.inside += sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) for thread in threads)


@contextmanager
def looking(all_finite: Callable[..., torch.Tensor]) -> Iterator[AfterStep]:
    """Steps whose gradients are looked at by `all_finite`."""
    looks = [module.all_finite for module in (reference, engine)]
    reference.all_finite = engine.all_finite = all_finite
    try:
        yield lambda outcome: None
    finally:
        reference.all_finite, engine.all_finite = looks


def blind(this: Round) -> AbstractContextManager[AfterStep]:
    """Nobody looks whether gradients are finite."""
    return looking(lambda tensors, like: torch.ones_like(like, dtype=torch.bool))


def finite(this: Round) -> AbstractContextManager[AfterStep]:
    """The look, on the clock."""
    return looking(this.clocked(engine.all_finite))


@contextmanager
def spikes(this: Round) -> Iterator[AfterStep]:
    """A detector with a full window, as it is after the first steps of a training."""
    detector = SpikeDetector(threshold=1e9, window=this.run.config.guard.window)
    for i in range(this.run.config.guard.window):
        detector.look(1 + i % 7, 1 + i % 5)
    yield this.clocked(lambda outcome: detector.look(outcome.loss, outcome.grad_norm))


@contextmanager
def checksums(this: Round) -> Iterator[AfterStep]:
    """Replicas compared after every step."""

    def compare(outcome: Outcome) -> None:
        assert differing_replicas(this.run.named, this.run.grid) == []

    yield this.clocked(compare)


GUARDS: dict[str, tuple[Guard, Guard]] = {  # without it, with it
    "watchdog": (nothing, watchdog),
    "finite": (blind, finite),
    "spikes": (nothing, spikes),
    "checksums": (nothing, checksums),
}
NOT_EVERY_STEP = ("checksums",)


@dataclass(frozen=True)
class Setting:
    """A configuration, the number of processes, and how much is measured."""

    config: str
    ranks: int
    rounds: int
    steps: int


@dataclass(frozen=True)
class Row:
    """One guard, on rank 0, in each round: a step's seconds without and with it, and those inside it."""

    name: str
    without: list[float]
    guarded: list[float]
    inside: list[float]

    @property
    def share(self) -> float:
        """Percent of a step that passes in the guard."""
        return 100 * median(self.inside) / median(self.without)

    def text(self) -> str:
        pairs = zip(self.without, self.guarded, strict=True)
        low, middle, high = quantiles([100 * (guarded / without - 1) for without, guarded in pairs], n=4)
        return (
            f"{self.name:<10} {median(self.without) * 1e3:9.2f} ms {median(self.inside) * 1e6:8.0f} us"
            f" {self.share:7.2f} % {middle:+7.1f} % [{low:+.1f}, {high:+.1f}]"
        )


def contest(setting: Setting, process: Process) -> list[Row]:
    """Every guard's row. Collective."""
    config = load_config(setting.config, [f"run.dir={tempfile.gettempdir()}/bench_guard"])
    run = build_run(config, check(config, process.world_size), read_inputs(config), process)
    progress, number = Progress(), 0

    def timed(guard: Guard) -> tuple[float, float]:
        """Seconds of a step, and those of them inside the guard."""
        nonlocal progress, number
        number += 1
        this = Round(run, number)
        with guard(this) as after_step:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(setting.steps):
                outcome = train_step(run, progress)
                read(run, [outcome.unread])
                progress = outcome.progress
                after_step(outcome)
            dist.barrier()
            seconds = time.perf_counter() - began
        return seconds / setting.steps, this.inside / setting.steps

    rows = [Row(name, [], [], []) for name in GUARDS]
    timed(nothing)  # caches, allocations
    for turn in range(setting.rounds):
        for row in rows:
            for guarded in (False, True) if turn % 2 == 0 else (True, False):
                seconds, inside = timed(GUARDS[row.name][guarded])
                (row.guarded if guarded else row.without).append(seconds)
                if guarded:
                    row.inside.append(inside)
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
    args = arguments()
    setting = Setting(args.config, args.ranks, args.rounds, args.steps)
    rows = measure(setting)
    print(f"{setting.ranks} ranks, {setting.rounds} rounds of {setting.steps} steps each way, {setting.config}")
    print(f"{'guard':<10} {'step':>12} {'inside':>11} {'share':>9} {'longer':>9} [quartiles]")
    for row in rows:
        print(row.text())
    print(
        f"in every step, together: {sum(row.share for row in rows if row.name not in NOT_EVERY_STEP):.2f} % of a step"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"setting": asdict(setting), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
