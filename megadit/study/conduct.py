"""Trials, each a training and its judging in processes of their own, several side by side; finished ones stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from megadit.runtime.disk import replace_file
from megadit.runtime.launch import end_with_parent
from megadit.runtime.status import STOPPED
from megadit.study.design import Failed, JudgeConfig, Study, Trial, fingerprint
from megadit.study.hardware import cores, machine
from megadit.study.record import record_of
from megadit.training.config import CONFIG_FILE, differing, load_config
from megadit.training.metrics import METRICS_FILE

RECORDS = "records"
LOG_FILE = "log.txt"


class Place(NamedTuple):
    """Where one of several trials side by side computes. gpu: None is the CPU."""

    threads: int
    gpu: int | None

    @property
    def environment(self) -> dict[str, str]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None  # the user's choice of GPUs, of which ours is a part
        chosen = {"CUDA_VISIBLE_DEVICES": "" if self.gpu is None else names[self.gpu] if names else str(self.gpu)}
        cpu = {"DS_ACCELERATOR": "cpu"} if self.gpu is None else {}
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), **chosen, **cpu}


def places(workers: int, gpus: int, trials: int) -> list[Place]:
    """One for each GPU, or for each core, and not more than trials; `workers` 0 is as many as there are."""
    count = max(1, min(workers or gpus or cores(), trials))
    return [Place(max(1, cores() // count), i % gpus if gpus else None) for i in range(count)]


def record_path(out: Path, trial: Trial) -> Path:
    return out / RECORDS / f"{trial.name}.json"


def check_no_others(out: Path, trials: Sequence[Trial]) -> None:
    """Raises ValueError for records of what the study does not have, which a report would show beside its own."""
    known = {record_path(out, trial) for trial in trials}
    others = [path.name for path in sorted((out / RECORDS).glob("*.json")) if path not in known]
    if others:
        raise ValueError(
            f"{out / RECORDS} holds {', '.join(others)}, not of this study; use another --out, or remove them"
        )


def is_finished(out: Path, trial: Trial, label: str, judge: JudgeConfig) -> bool:
    """Whether a trial's record is there, of pictures as they are to be judged. Its label and place become today's.

    Raises ValueError where the folder holds a trial of this name, finished or not, with other settings.
    """
    path = record_path(out, trial)
    record = _read_record(path) if path.exists() else None
    others = _other_settings(trial, out / trial.name / CONFIG_FILE, record)
    if others:
        told = ", ".join(others)
        raise ValueError(
            f"{out} holds {trial.name} with other settings ({told}); use another --out, or remove it from there"
        )
    if record is None or not _judged_as(record, judge):
        return False
    today = {"place": trial.place, "label": label or trial.variant}
    if record | today != record:
        _write_record(path, record | today)
    return True


def _other_settings(trial: Trial, begun: Path, record: Mapping[str, Any] | None) -> list[str]:
    """What the trial was begun with, or finished, and is not set to now."""
    if begun.exists():
        now, then = trial.config().to_dict(), load_config(begun).to_dict()
        told = [each for section in now for each in differing(section, then[section], now[section])]
        return [each for each in told if not each.startswith(("run.dir=", "run.name="))]
    if record and record["fingerprint"] != fingerprint(trial.config()):
        return ["unknown which: its folder is gone"]
    return []


def _read_record(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file."""
    try:
        record = json.loads(path.read_text())
        record["fingerprint"], record["score"]["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a trial ({error!r}); remove it to judge the trial again") from error
    return record


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(record, indent=1) + "\n").encode())


def _judged_as(record: Mapping[str, Any], judge: JudgeConfig) -> bool:
    wanted = {"trained": judge.trained, "heldout": judge.heldout}
    counts = [(kind, count["asked"]) for task in record["score"]["tasks"].values() for kind, count in task.items()]
    return record["score"]["seed"] == judge.seed and all(asked == wanted[kind] for kind, asked in counts)


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
        self.starting = threading.Lock()  # so that nothing starts unseen by what stops

    def conduct(self, trials: Sequence[Trial]) -> None:
        """Raises Failed for the first trial that fails, after the others have been stopped; they can be resumed."""
        (self.out / RECORDS).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._try, trial) for trial in trials]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                with self.starting:
                    self.stopping.set()
                    for process in self.running:
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
        _write_record(record_path(self.out, trial), record)

    def _wait(self, trial: Trial, command: Sequence[str], place: Place) -> None:
        """Run a command of a trial to its end, its output in the trial's log; tell of the steps that it makes.

        In a session of its own: Ctrl-C reaches this process alone, which asks the others to stop, so that they save.
        """
        run = self.out / trial.name
        told = steps_done(run)
        with self.starting, (run / LOG_FILE).open("ab") as log:
            if self.stopping.is_set():
                raise Failed(f"{trial.name} was stopped; start again to go on")
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=place.environment,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
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
            with self.starting:
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
