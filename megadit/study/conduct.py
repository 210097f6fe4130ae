"""Trials, each a training and its judging in processes of their own, several side by side; finished ones stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from megadit.runtime.disk import replace_file
from megadit.runtime.status import STOPPED
from megadit.study.design import Study, Trial, fingerprint
from megadit.study.hardware import machine
from megadit.study.record import record_of
from megadit.training.config import CONFIG_FILE, load_config
from megadit.training.metrics import METRICS_FILE

RECORDS = "records"
LOG_FILE = "log.txt"


class Failed(RuntimeError):
    """A trial's training or judging ended with an error."""


class Place(NamedTuple):
    """Where one of several trials side by side computes. gpu: None is the CPU."""

    threads: int
    gpu: int | None

    @property
    def environment(self) -> dict[str, str]:
        chosen = {"CUDA_VISIBLE_DEVICES": "" if self.gpu is None else str(self.gpu)}
        cpu = {"DS_ACCELERATOR": "cpu"} if self.gpu is None else {}
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), **chosen, **cpu}


def record_path(out: Path, trial: Trial) -> Path:
    return out / RECORDS / f"{trial.name}.json"


def is_finished(out: Path, trial: Trial) -> bool:
    """Raises ValueError where the folder holds a trial of this name, finished or not, with other settings."""
    path, begun = record_path(out, trial), out / trial.name / CONFIG_FILE
    wanted = fingerprint(trial.config())
    if path.exists():
        found = json.loads(path.read_text())["fingerprint"]
    elif begun.exists():
        found = fingerprint(load_config(begun))
    else:
        return False
    if found != wanted:
        raise ValueError(f"{out} holds {trial.name} with other settings; use another --out, or remove it from there")
    return path.exists()


class Conductor:
    """Runs trials into a folder."""

    def __init__(
        self, study: Study, out: Path, places: Sequence[Place], judge: Path, made: Callable[[int], object]
    ) -> None:
        """judge: the program that scores a run. made: hears of how many steps more are done, from several threads."""
        self.study, self.out, self.judge, self.made = study, out, judge, made
        self.free, self.workers = list(places), len(places)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def conduct(self, trials: Sequence[Trial]) -> None:
        """Raises Failed for the first trial that fails, after the others have been stopped; they can be resumed."""
        (self.out / RECORDS).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._try, trial) for trial in trials]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stopping.set()
                for process in list(self.running):
                    process.terminate()
                raise

    def _try(self, trial: Trial) -> None:
        if self.stopping.is_set():
            return
        place = self.free.pop()
        try:
            self._train_and_judge(trial, place)
        except Exception:
            self.stopping.set()
            raise
        finally:
            self.free.append(place)

    def _train_and_judge(self, trial: Trial, place: Place) -> None:
        run, judge = self.out / trial.name, self.study.judge
        run.mkdir(exist_ok=True)
        train = ["-m", "megadit.train", "--config", str(trial.base), f"run.dir={run}", *trial.overrides]
        self._wait(trial, [sys.executable, *train], place)
        counts = ["--trained", str(judge.trained), "--heldout", str(judge.heldout), "--seed", str(judge.seed)]
        sheet = ["--sheet", str(run / "sheet.png")]
        self._wait(trial, [sys.executable, str(self.judge), str(run), *counts, *sheet], place)
        record = record_of(trial, self.study.variants[trial.variant].label, run) | {"machine": machine(self.workers)}
        replace_file(record_path(self.out, trial), (json.dumps(record, indent=1) + "\n").encode())

    def _wait(self, trial: Trial, command: Sequence[str], place: Place) -> None:
        """Run a command of a trial to its end, its output in the trial's log; tell of the steps that it makes."""
        run = self.out / trial.name
        told = steps_done(run)
        with (run / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=place.environment)
        self.running.add(process)
        try:
            while True:
                try:
                    status = process.wait(timeout=2)
                    break
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    done = steps_done(run)
                    self.made(done - told)
                    told = done
        finally:
            self.running.discard(process)
        if status == STOPPED:
            raise Failed(f"{trial.name} was stopped; start again to go on")
        if status:
            tail = (run / LOG_FILE).read_text(errors="replace").strip().splitlines()[-3:]
            raise Failed(f"{trial.name} ended with status {status}; {run / LOG_FILE} ends with: {' / '.join(tail)}")


def steps_done(run: Path) -> int:
    """Lines of a run's metrics, one a step."""
    try:
        return (run / METRICS_FILE).read_bytes().count(b"\n")
    except OSError:
        return 0
