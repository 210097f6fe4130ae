"""The run from its last checkpoint to its last step."""

from __future__ import annotations

import logging

import torch.distributed as dist

import megadit
from megadit import checkpoint
from megadit.model.count import forward_flops
from megadit.runtime.clock import Clock, peak_memory_gb
from megadit.sampling.picture import save_grid
from megadit.training.build import TOKENIZER_FILE, Run
from megadit.training.config import save_config
from megadit.training.evaluate import heldout_loss, sample_pictures
from megadit.training.metrics import Recorder
from megadit.training.state import logical_state
from megadit.training.step import train_step

logger = logging.getLogger("megadit")


def resume(run: Run) -> int:
    """Load the newest complete checkpoint, if there is one, and return its step; else 0. Collective.

    Raises ValueError naming the tensor or file when the checkpoint does not fit the run.
    """
    path = checkpoint.latest(run.config.directory / "checkpoints")
    if path is None:
        return 0
    checkpoint.load(path, logical_state(run.named, run.ema, run.engine, run.grid, owned_only=False))
    step = checkpoint.read_manifest(path)["step"]
    run.engine.restored(step)
    return step


def save(run: Run, step: int) -> None:
    """Write a checkpoint of the state after `step`. Collective."""
    config = run.config
    checkpoint.save(
        config.directory / "checkpoints",
        step,
        logical_state(run.named, run.ema, run.engine, run.grid, owned_only=True),
        {"config": config.to_dict(), "megadit": megadit.__version__},
        keep=config.checkpoint.keep,
    )


def prepare_directory(run: Run) -> None:
    """The run's folder with its resolved configuration and tokenizer, written by the main process."""
    directory = run.config.directory
    if run.process.is_main:
        (directory / "samples").mkdir(parents=True, exist_ok=True)
        save_config(run.config, directory / "config.yaml")
        (directory / TOKENIZER_FILE).write_bytes(run.inputs.tokenizer.serialized)
    dist.barrier()


def train(run: Run, start: int) -> None:
    """Make the steps after `start`. Collective."""
    config, directory = run.config, run.config.directory
    if start >= config.run.steps:
        logger.info("%s is finished: step %d of %d", directory, start, config.run.steps)
        return
    prepare_directory(run)
    recorder = Recorder(directory, start, config.run.steps, config.log.tensorboard) if run.process.is_main else None
    flops_per_gpu = 3 * forward_flops(config.model, config.text) * config.data.global_batch / run.grid["world"].size
    clock = Clock()
    for step in range(start + 1, config.run.steps + 1):
        report = train_step(run, step)
        seconds = clock.lap()
        last = step == config.run.steps
        extra: dict[str, float] = {}
        if _due(step, config.log.evaluate_every, last):
            extra["heldout_loss"] = heldout_loss(run)
        if _due(step, config.log.sample_every, last):
            pictures = sample_pictures(run)
            if run.process.is_main:
                save_grid(pictures, directory / "samples" / f"step_{step:08d}.png")
        if recorder is not None:
            recorder.record(
                report,
                seconds=seconds,
                images_per_second=config.data.global_batch / seconds,
                tflops_per_gpu=flops_per_gpu / seconds / 1e12,
                peak_memory_gb=peak_memory_gb(run.process.device),
                **extra,
            )
        if _due(step, config.checkpoint.every, last):
            save(run, step)
        clock.lap()  # evaluating, recording and saving are not part of the next step's time
    if recorder is not None:
        recorder.close()
        logger.info("finished: %s", directory)


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)
