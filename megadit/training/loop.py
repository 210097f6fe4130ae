"""The run from its last checkpoint to its last step."""

from __future__ import annotations

import logging
import math
import os
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
from megadit.runtime.agreement import of_main
from megadit.runtime.clock import Clock, peak_memory_gb
from megadit.sampling.picture import save_grid
from megadit.training.build import TOKENIZER_FILE, Run
from megadit.training.config import CONFIG_FILE, differing, images_per_group
from megadit.training.evaluate import heldout_loss, sample_pictures
from megadit.training.metrics import Recorder
from megadit.training.state import logical_state, resumable_state
from megadit.training.step import StepReport, Unread, read, train_step

logger = logging.getLogger("megadit")


class Diverged(RuntimeError):
    """The loss or the gradient is no longer finite."""


class Unsaved(RuntimeError):
    """The training is done, but its last checkpoint could not be written."""


def resume(run: Run) -> int:
    """Load the newest complete checkpoint, if there is one, and return its step; else 0. Collective.

    Raises ValueError naming the tensor or file when the checkpoint is damaged or does not fit the run.
    """
    newest = of_main(lambda: find_resumable(run.config.directory / "checkpoints"))
    if newest is None:
        return 0
    path, step = newest.path, newest.step
    state = resumable_state(run.named, run.ema, run.engine, run.grid, newest.tensors)
    try:
        checkpoint.load(path, state, verify=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; another run.name or run.dir starts a new run") from error
    for section, keys in changed(newest.config, run.config.to_dict()).items():
        logger.warning("going on with another %s than the checkpoint's: %s", section, ", ".join(keys))
    run.engine.restored(step)
    logger.info("going on from %s", path)
    return step


class Resumable(NamedTuple):
    """A checkpoint to go on from. `tensors`: their names."""

    path: Path
    step: int
    config: dict[str, Any]
    tensors: frozenset[str]


def find_resumable(folder: Path) -> Resumable | None:
    """The newest complete checkpoint, if there is one. Raises ValueError for one that has weights alone."""
    path = checkpoint.latest(folder)
    if path is None:
        return None
    manifest = checkpoint.read_manifest(path)
    if not any(name.startswith("exp_avg.") for name in manifest["tensors"]):
        raise ValueError(
            f"{path} holds weights alone, no state of the optimizer to go on with; start from it in another run.dir, "
            f"with run.init_from={path}"
        )
    return Resumable(path, manifest["step"], manifest["metadata"]["config"], frozenset(manifest["tensors"]))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys, by section, that decide what is learned from what, and that differ between two configurations."""
    found = {
        section: differing(section, before[section], now[section])
        for section in ("model", "text", "data", "objective", "optim")
    }
    found["run"] = differing("run", before["run"], {key: now["run"][key] for key in ("seed", "dtype")})
    return {section: changes for section, changes in found.items() if changes}


def save(run: Run, step: int) -> None:
    """Write a checkpoint of the state after `step`, or begin to. Collective."""
    state = logical_state(run.named, run.ema, run.engine, run.grid, owned_only=True)
    run.saver.save(step, state, {"config": run.config.to_dict(), "megadit": megadit.__version__})


def prepare_directory(run: Run) -> None:
    """The run's folder with its resolved configuration and tokenizer, written by the main process. Collective.

    Raises ValueError on a rank that cannot write there, or does not see what the main process wrote.
    """
    directory, fault = run.config.directory, None
    try:
        if run.process.is_main:
            (directory / "samples").mkdir(parents=True, exist_ok=True)
            if isinstance(run.inputs.condition, Captions):
                write_whole(directory / TOKENIZER_FILE, run.inputs.condition.tokenizer.serialized)
            write_whole(directory / CONFIG_FILE, run.config.to_yaml().encode())
    except OSError as error:
        fault = f"run.dir={directory} cannot be written: {error.strerror}"
    dist.barrier()
    if fault is None and not (directory / CONFIG_FILE).exists():
        fault = f"run.dir={directory} on process {run.process.rank} is not what process 0 writes; it must be shared"
    if fault is not None:
        raise ValueError(fault)


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one step: a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def train(run: Run, start: int, progress: Callable[..., None] = lambda step, doing="": None) -> None:
    """Make the steps after `start`. Collective. `progress(step, doing)` hears of each one, and of what comes between.

    Raises on all ranks, with no save running: Diverged when a loss or a gradient is not finite, the checkpoints are of
    earlier steps then; Unsaved when the last checkpoint could not be written.
    """
    config, directory = run.config, run.config.directory
    recorder = Recorder(directory, start, config.run.steps, config.log.tensorboard) if run.process.is_main else None
    flops = forward_flops(replace(config.model, routing_group=images_per_group(config)), config.text)
    flops_per_gpu = 3 * flops * config.data.global_batch / run.grid["world"].size
    clock = Clock()
    unread: list[Unread] = []
    for step in range(start + 1, config.run.steps + 1):
        unread.append(train_step(run, step))
        progress(step)
        last = step == config.run.steps
        evaluates = _due(step, config.log.evaluate_every, last)
        saves, draws = _due(step, config.checkpoint.every, last), _due(step, config.log.sample_every, last)
        if not (evaluates or saves or draws or _due(step, config.log.every, last)):
            continue
        reports = read(run, unread)
        seconds = clock.lap() / len(unread)  # of one step, on average since the last look
        unread = []
        for report in reports:
            check_finite(run, report)
            progress(step, "evaluating")
            extra = {"heldout_loss": heldout_loss(run)} if evaluates and report.step == step else {}
            if recorder is not None:
                recorder.record(
                    report,
                    seconds=seconds,
                    images_per_second=config.data.global_batch / seconds,
                    tflops_per_gpu=flops_per_gpu / seconds / 1e12,
                    peak_memory_gb=peak_memory_gb(run.process.device),
                    **extra,
                )
        if saves:
            progress(step, "saving")
            save(run, step)
        if draws:
            progress(step, "drawing")
            pictures = sample_pictures(run)
            if run.process.is_main:
                write_pictures(pictures, directory / "samples" / f"step_{step:08d}.png")
        progress(step)
        clock.lap()  # evaluating, recording, saving and drawing are not part of the next step's time
    if recorder is not None:
        recorder.close()
    progress(config.run.steps, "saving")
    run.saver.wait()
    if run.saver.failure is not None:
        raise Unsaved(
            f"step {config.run.steps} is done, but its checkpoint was not saved; make room for it and start again, "
            f"from the newest one in {directory}"
        )
    logger.info("finished: %s", directory)


def write_pictures(pictures_BCHW: Tensor, path: Path) -> None:
    """A PNG; where there is no room for it, an error in the log: pictures are no reason to end a training."""
    try:
        save_grid(pictures_BCHW, path)
    except OSError as error:
        logger.error("%s was not written: %s", path, error)


def check_finite(run: Run, report: StepReport) -> None:
    """Raises Diverged when the step's loss or gradient is not finite."""
    if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
        run.saver.wait()
        raise Diverged(
            f"step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}; lower optim.lr or optim.clip "
            f"and start again, from the newest checkpoint in {run.config.directory}"
        )


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)
