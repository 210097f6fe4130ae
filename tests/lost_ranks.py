"""Trainings in which a rank is lost: what the others do, how soon, and what they say."""

import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.runtime.lines import read_lines
from megadit.training.events import EVENTS_FILE
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import TIME_LIMIT, _Ranks, launcher_environ
from tests.training.assembled import CONFIG

Plant = Callable[[int, Path], None]
STEPS = 100_000  # more than it comes to


@dataclass(frozen=True)
class Outcome:
    """What was left of a training: of each rank its exit status (None: it goes on), stderr and process number; how many
    seconds after the fault the last one ended; the run's folder.
    """

    statuses: list[int | None]
    errors: list[str]
    seconds: float
    pids: list[int]
    folder: Path

    def lost(self) -> dict[str, Any]:
        """The one event of the loss."""
        (event,) = [line for line in read_lines(self.folder / EVENTS_FILE) if line["event"] == "lost"]
        return event

    def dumps(self) -> dict[str, str]:
        """The files that the ranks wrote, by name."""
        (folder,) = [path for path in (self.folder / "faults").iterdir() if path.is_dir()]
        return {path.name: path.read_text() for path in folder.iterdir()}


def steps_of(folder: Path) -> int:
    path = folder / METRICS_FILE
    return len(read_metrics(path)) if path.exists() else 0


def _train(rank: int, plant: Plant | None, folder: Path, environ: dict[str, str], argv: Sequence[str]) -> int:
    from megadit.train import main

    os.environ.update({key: value.format(rank=rank) for key, value in environ.items()})
    handle = os.open(folder.parent / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    if plant is not None:
        plant(rank, folder)
    return main(argv)


def train_and_lose(
    world_size: int,
    folder: Path,
    *argv: str,
    plant: Plant | None = None,
    send: tuple[int, signal.Signals] | None = None,
    after: int = 3,
    gone: Sequence[int] = (),
    limit: float = TIME_LIMIT,
) -> Outcome:
    """Train until a fault: `plant(rank, folder)`, called in each rank, prepares it, and writes the file `fault` beside
    the folder when it happens; or `send`, a signal to a rank, once `after` steps are done. `gone`: who need not end.
    """
    ranks = _Ranks()
    try:
        command = ["--config", CONFIG, f"run.steps={STEPS}", f"run.dir={folder}", "checkpoint.every=1000000", *argv]
        ranks.ask(world_size, _train, plant, folder, launcher_environ(world_size), command)
        deadline = time.monotonic() + limit
        while not ((folder.parent / "fault").exists() if plant else steps_of(folder) >= after):
            assert time.monotonic() < deadline, "the moment did not come"
            for end in multiprocessing.connection.wait(ranks.ends, timeout=0.02):
                raise AssertionError(f"a rank ended before the fault: {ranks.receive(ranks.ends.index(end))[1:]}")
        began = time.monotonic()
        if send is not None:
            os.kill(ranks.processes[send[0]].pid, send[1])
        for rank in range(world_size):
            if rank not in gone:
                ranks.processes[rank].join(max(0, deadline - time.monotonic()))
        seconds = time.monotonic() - began
        statuses = [process.exitcode for process in ranks.processes]
        errors = [(folder.parent / f"stderr_{rank}").read_text() for rank in range(world_size)]
        return Outcome(statuses, errors, seconds, [process.pid for process in ranks.processes], folder)
    finally:
        ranks.kill()
