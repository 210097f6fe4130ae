"""The run from its last checkpoint to its last step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

import megadit
from megadit import checkpoint
from megadit.encoders.condition import Captions
from megadit.model.count import forward_flops
from megadit.parallel.replicas import differing_replicas
from megadit.runtime.agreement import gathered, of_main
from megadit.runtime.clock import Clock, peak_memory_gb
from megadit.runtime.disk import replace_file
from megadit.runtime.status import DIVERGED, FINISHED, LOST, STOPPED, UNSAVED
from megadit.runtime.stopping import StopRequests
from megadit.sampling.generate import NotFinite
from megadit.sampling.picture import save_grid
from megadit.training.build import TOKENIZER_FILE, Run
from megadit.training.config import CONFIG_FILE, differing, images_per_group
from megadit.training.evaluate import heldout_loss, sample_pictures
from megadit.training.events import EVENTS_FILE, Events
from megadit.training.metrics import METRICS_FILE, Recorder, read_metrics
from megadit.training.progress import Progress
from megadit.training.spikes import SpikeDetector
from megadit.training.state import logical_state, resumable_state
from megadit.training.step import Outcome, read, train_step

logger = logging.getLogger("megadit")


READING = ("data.threads", "data.ahead", "data.verify", "data.resolution")


class Ending(RuntimeError):
    """A training ends before its last step, on all ranks alike. `status`: the exit status."""

    status: int


class Diverged(Ending):
    """Too many losses or gradients are not finite, or spikes."""

    status = DIVERGED


class Unsaved(Ending):
    """The training is done, but its last checkpoint could not be written."""

    status = UNSAVED


class Stopped(Ending):
    """Somebody, or the clock, has asked the run to stop, and it has."""

    status = STOPPED


class Flipped(Ending):
    """Replicas of a parameter differ."""

    status = LOST


def resume(run: Run) -> Progress:
    """Load the newest complete checkpoint, if there is one, and return where it is; else the beginning. Collective.

    Raises ValueError naming the tensor or file when the checkpoint is damaged or does not fit the run.
    """
    folder = run.config.directory / "checkpoints"
    newest = of_main(lambda: find_resumable(checkpoint.latest(folder)))
    if newest is None:
        return Progress()
    for section, keys in changed(newest.config, run.config.to_dict()).items():
        logger.warning("going on with another %s than the checkpoint's: %s", section, ", ".join(keys))
    progress = load(run, newest)
    logger.info("going on from %s", newest.path)
    return progress


def load(run: Run, found: Resumable) -> Progress:
    """Fill the run's state from a checkpoint. Collective; raises ValueError as `resume`."""
    state = resumable_state(run.named, run.ema, run.engine, run.grid, found.tensors)
    try:
        checkpoint.load(found.path, state, verify=True)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}; another run.name or run.dir starts a new run") from error
    run.engine.restored(found.progress.updates)
    return found.progress


class Resumable(NamedTuple):
    """A checkpoint to go on from. `tensors`: their names."""

    path: Path
    progress: Progress
    config: dict[str, Any]
    tensors: frozenset[str]


def find_resumable(path: Path | None) -> Resumable | None:
    """The checkpoint at `path`, if there is one. Raises ValueError for one that has weights alone."""
    if path is None:
        return None
    manifest = checkpoint.read_manifest(path)
    if not any(name.startswith("exp_avg.") for name in manifest["tensors"]):
        raise ValueError(
            f"{path} holds weights alone, no state of the optimizer to go on with; start from it in another run.dir, "
            f"with run.init_from={path}"
        )
    progress = Progress.of(manifest["step"], manifest["metadata"])
    return Resumable(path, progress, manifest["metadata"]["config"], frozenset(manifest["tensors"]))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys, by section, that decide what is learned from what, and that differ between two configurations."""
    found = {
        section: differing(section, before[section], now[section])
        for section in ("model", "text", "data", "objective", "optim")
    }
    # How the data is read, not what is read.
    found["data"] = [line for line in found["data"] if line.split("=")[0] not in READING]
    found["run"] = differing("run", before["run"], {key: now["run"][key] for key in ("seed", "dtype")})
    return {section: changes for section, changes in found.items() if changes}


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint of the state after the last step, or begin to. Collective."""
    state = logical_state(run.named, run.ema, run.engine, run.grid, owned_only=True)
    metadata = {
        "config": run.config.to_dict(),
        "megadit": megadit.__version__,
        "progress": progress.to_dict(),
    }
    run.saver.save(progress.step, state, metadata)


def prepare_directory(run: Run) -> Events:
    """The run's folder with its resolved configuration, tokenizer and events, written by the main process. Collective.

    Raises ValueError on a rank that cannot write there, or does not see what the main process wrote.
    """
    directory, events, fault = run.config.directory, Events(None), None
    try:
        if run.process.is_main:
            (directory / "samples").mkdir(parents=True, exist_ok=True)
            if isinstance(run.inputs.condition, Captions):
                replace_file(directory / TOKENIZER_FILE, run.inputs.condition.tokenizer.serialized)
            replace_file(directory / CONFIG_FILE, run.config.to_yaml().encode())
            events = Events(directory)
    except OSError as error:
        fault = f"run.dir={directory} cannot be written: {error.strerror}"
    except ValueError as error:  # nobody is to wait at the barrier in vain
        fault = f"run.dir={directory}: {error}"
    dist.barrier()
    if fault is None and not (directory / CONFIG_FILE).exists():
        fault = f"run.dir={directory} on process {run.process.rank} is not what process 0 writes; it must be shared"
    if fault is not None:
        raise ValueError(fault)
    return events


class Oversight(NamedTuple):
    """Who watches over a training, and who hears of it."""

    events: Events
    stops: StopRequests
    progress: Callable[..., None]  # `Watchdog.progress`


def train(run: Run, start: Progress, oversight: Oversight) -> None:
    """Make the steps after `start`. Collective.

    Raises an `Ending` on all ranks, with no save running, where the last step is not reached or not saved.
    """
    course = Course(run, start, oversight)
    try:
        course.go()
    except Ending as ending:
        course.events.tell("stop", course.progress.step, str(ending), status=ending.status)
        raise
    finally:
        course.close()


class Course:
    """The steps of a training one after the other, and what is done between them. Methods are collective."""

    def __init__(self, run: Run, start: Progress, oversight: Oversight) -> None:
        self.run, self.config, self.progress = run, run.config, start
        self.events, self.stops, self.tell_progress = oversight
        self.recorder = self._open_recorder()
        self.detector = self._prime_detector()
        self.clock = Clock()
        self.unread: list[Outcome] = []
        self.owes_save = False  # one was due after a step that was skipped
        self._step_flops: dict[int, float] = {}  # by the number of tokens

    def _open_recorder(self) -> Recorder | None:
        """metrics.jsonl without the lines of later steps, on the main process."""
        if not self.run.process.is_main:
            return None
        config = self.config
        return Recorder(config.directory, self.progress.step, config.run.steps, config.log.tensorboard)

    def _prime_detector(self) -> SpikeDetector | None:
        """A detector that has seen the last steps: every rank has the same, so that all decide alike."""
        guard = self.config.guard
        if guard.spike == 0:
            return None
        detector = SpikeDetector(guard.spike, guard.window)
        path = self.config.directory / METRICS_FILE
        for line in of_main(lambda: read_metrics(path)[-2 * guard.window :]):
            if not line.get("skipped"):  # an older version skipped none
                detector.look(line["loss"], line["grad_norm"])
        return detector

    def go(self) -> None:
        """Every step until the last one."""
        while self.progress.step < self.config.run.steps:
            outcome = train_step(self.run, self.progress, self.stops.reason is not None)
            self.progress = outcome.progress
            self.unread.append(outcome)
            self.tell_progress(self.progress.step)
            if outcome.unread.skipped:
                self.skipped(outcome)
            elif self.detector and (spike := self.detector.look(outcome.loss, outcome.grad_norm)) and self.back(spike):
                continue
            # After a step that was left out nothing can be saved: the next one hears of the wish again.
            asked = self.asked() if outcome.stops and not outcome.unread.skipped else None
            self.between(outcome, stops=asked is not None)
            if asked and self.progress.step < self.config.run.steps:
                self._settle()
                unsaved = f" ({self.run.saver.failure})" if self.run.saver.failure else ""
                raise Stopped(f"stopped after step {self.progress.step}{unsaved}: {asked}; start again to go on")
        self._settle()
        if self.run.saver.failure is not None:
            raise Unsaved(
                f"step {self.config.run.steps} is done, but its checkpoint was not saved; make room for it and start "
                f"again, from the newest one in {self.config.directory}"
            )
        self.events.tell("finish", self.progress.step, "the last step is done and saved", status=FINISHED)
        logger.info("finished: %s", self.config.directory)

    def between(self, outcome: Outcome, stops: bool) -> None:
        """What is due after a step: look at it, evaluate, compare replicas, save, draw. When it `stops`, save alone."""
        config, log, step = self.config, self.config.log, self.progress.step
        last = step == config.run.steps
        evaluates, draws = _due(step, log.evaluate_every, last), _due(step, log.sample_every, last)
        if stops and not last:  # the time until SIGKILL is short
            evaluates = draws = False
        saves = _due(step, config.checkpoint.every, last) or stops or self.owes_save
        if saves and outcome.unread.skipped:
            # The weights may be to blame: they are saved when another step has succeeded.
            saves, self.owes_save = False, True
        if saves or self.config.guard.checksum_every and _due(step, self.config.guard.checksum_every, last):
            self.compare_replicas()
        if not (evaluates or saves or draws or _due(step, log.every, last)):
            return
        self.look(evaluates)
        if saves:
            self.owes_save = False
            self.tell_progress(step, "saving")
            save(self.run, self.progress)
        self._tell_saves()
        if draws:
            self.tell_progress(step, "drawing")
            draw_pictures(self.run, step)
        self.tell_progress(step)
        self.clock.lap()  # evaluating, recording, saving and drawing are not part of the next step's time

    def look(self, evaluates: bool) -> None:
        """Read the steps since the last look from the device, and record them."""
        reports = read(self.run, [outcome.unread for outcome in self.unread])
        seconds = self.clock.lap() / len(reports)  # of one step, on average since the last look
        flops = sum(self._flops_per_gpu(outcome.tokens) for outcome in self.unread) / len(reports)  # as the seconds are
        sample_ids = self._sample_ids() if self.config.log.sample_ids else None
        self.unread = []
        for i, report in enumerate(reports):
            heldout = {}
            if evaluates and report.step == self.progress.step:
                self.tell_progress(report.step, "evaluating")
                heldout["heldout_loss"] = heldout_loss(self.run)
            if self.recorder is not None:
                self.recorder.record(
                    report,
                    seconds=seconds,
                    images_per_second=self.config.data.global_batch / seconds,
                    tflops_per_gpu=flops / seconds / 1e12,
                    peak_memory_gb=peak_memory_gb(self.run.process.device),
                    **heldout,
                    **({"sample_ids": sample_ids[i]} if sample_ids else {}),
                )

    def _flops_per_gpu(self, tokens: int) -> float:
        """Of a step on images of so many tokens."""
        if tokens not in self._step_flops:
            config = self.config
            model = replace(config.model, routing_group=images_per_group(config))
            images = 3 * config.data.global_batch / self.run.grid["world"].size  # backward costs twice the forward
            self._step_flops[tokens] = forward_flops(model, config.text, tokens) * images
        return self._step_flops[tokens]

    def _sample_ids(self) -> list[list[int]]:
        """Of each unread step the samples that it trained on, as the data-parallel ranks read them."""
        grid = self.run.grid
        speaks = grid["tp"].rank == 0 and grid["pp"].rank == 0
        told = gathered([outcome.sample_ids for outcome in self.unread] if speaks else None)
        of_ranks = [ids for ids in told if ids is not None]
        return [[sample for ids in of_ranks for sample in ids[i]] for i in range(len(self.unread))]

    def skipped(self, outcome: Outcome) -> None:
        """Tell of a step that was left out. Raises Diverged when there are too many, or it is the last one: whether the
        weights are to blame is not known, so nothing is saved before another step has succeeded.
        """
        guard, step = self.config.guard, self.progress.step
        whose = ", ".join(f"rank {spoiler.rank}" for spoiler in outcome.spoilers) or "no rank's own, but their sum"
        reason = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}: {whose}"
        self.events.tell("skip", step, reason, ranks=[spoiler._asdict() for spoiler in outcome.spoilers])
        logger.warning("step %d is left out: %s", step, reason)
        last = step == self.config.run.steps
        if last or len(self.progress.skipped) > guard.max_skips:
            self._settle()
            self.look(evaluates=False)
            why = "it is the last step" if last else f"guard.max_skips={guard.max_skips}"
            raise Diverged(
                f"step {step}: {reason}; {len(self.progress.skipped)} of the last {guard.window} steps are left out "
                f"({why}); lower optim.lr or optim.clip, or look at the samples in {EVENTS_FILE}, and start again, "
                f"from the newest checkpoint in {self.config.directory}"
            )

    def back(self, spike: str) -> bool:
        """Go back to the newest checkpoint before the last step, if there is one, and pass over what came since.

        Raises Diverged when the run has gone back too often, or cannot.
        """
        folder, bad = self.config.directory / "checkpoints", self.progress
        self.events.tell("spike", bad.step, spike)
        self._settle()
        if bad.rewinds >= self.config.guard.max_rewinds:
            raise Diverged(
                f"step {bad.step}: {spike}, after {bad.rewinds} returns to older checkpoints (guard.max_rewinds); "
                f"lower optim.lr or optim.clip and start again, from the newest checkpoint in {self.config.directory}"
            )
        self.tell_progress(bad.step, "going back")
        try:
            found = of_main(lambda: find_resumable(checkpoint.newest_before(folder, bad.step)))
            if found is None:
                logger.warning("step %d: %s; there is no checkpoint before it to go back to", bad.step, spike)
                return False
            self.progress = load(self.run, found).gone_back(bad)
        except ValueError as error:
            raise Diverged(f"step {bad.step}: {spike}, and there is no going back: {error}") from error
        if self.run.process.is_main:
            checkpoint.go_back(folder, found.progress.step)
        dist.barrier()  # nobody looks at the folder before it has changed
        first, last = found.progress.batch + 1, bad.batch
        reason = f"{spike}: back to step {found.progress.step}, batches {first} to {last} are passed over"
        self.events.tell("rewind", bad.step, reason, to_step=found.progress.step, batches=[first, last])
        logger.warning("step %d: %s", bad.step, reason)
        self.close()
        self.recorder, self.unread, self.owes_save = self._open_recorder(), [], False
        self.detector = self._prime_detector()
        self.tell_progress(self.progress.step)
        self.clock.lap()
        return True

    def compare_replicas(self) -> None:
        """Raises Flipped where replicas of a parameter differ, if `guard.checksum_every` asks for it."""
        if not self.config.guard.checksum_every:
            return
        differences = differing_replicas(self.run.named, self.run.grid)
        if differences:
            first, step = differences[0], self.progress.step
            ranks = sorted({rank for difference in differences for rank in difference.ranks})
            reason = f"{first.name} and {len(differences) - 1} other parameters differ on ranks {ranks}"
            self.events.tell("flip", step, reason, ranks=ranks, parameters=[d.name for d in differences])
            self._settle()
            raise Flipped(
                f"step {step}: {reason}: memory has changed by itself; look at these ranks' machines, and start again, "
                f"from the newest checkpoint in {self.config.directory}"
            )

    def asked(self) -> str:
        """Which rank is asked to stop, and by what."""
        reasons = enumerate(gathered(self.stops.reason))
        reason = next(f"rank {rank}: {reason}" for rank, reason in reasons if reason is not None)
        self.events.tell("signal", self.progress.step, reason)
        return reason

    def _settle(self) -> None:
        """Wait for the save that is running, if one is."""
        self.tell_progress(self.progress.step, "saving")
        self.run.saver.wait()
        self._tell_saves()

    def _tell_saves(self) -> None:
        for saved in self.run.saver.take_ended():
            reason = saved.failure or f"in {saved.seconds:.3g} s"
            self.events.tell("save", saved.step, reason, saved=saved.failure is None, seconds=saved.seconds)

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


def draw_pictures(run: Run, step: int) -> None:
    """Pictures along the way, into the run's folder; a training does not end over them. Collective."""
    try:
        pictures = sample_pictures(run)
    except NotFinite as error:  # on every rank: all hold the same pictures
        if run.process.is_main:
            logger.warning("no pictures of step %d: %s", step, error)
        return
    if run.process.is_main:
        write_pictures(pictures, run.config.directory / "samples" / f"step_{step:08d}.png")


def write_pictures(pictures_BCHW: Tensor, path: Path) -> None:
    """A PNG; where there is no room for it, an error in the log: pictures are no reason to end a training."""
    try:
        save_grid(pictures_BCHW, path)
    except OSError as error:
        logger.error("%s was not written: %s", path, error)


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)
