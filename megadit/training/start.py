"""The start of a training: all ranks read, check and build the same things, or end alike before the first step."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megadit.data.mixture import Mixture
from megadit.parallel.layout import Layout
from megadit.runtime.agreement import gathered
from megadit.runtime.launch import Process
from megadit.runtime.lock import hold
from megadit.runtime.seed import use_deterministic_kernels
from megadit.runtime.status import BAD_INPUT, FINISHED
from megadit.runtime.stopping import StopRequests
from megadit.runtime.watchdog import Watchdog
from megadit.training.build import Inputs, Run, build_run, read_inputs
from megadit.training.config import RunConfig, load_checked
from megadit.training.encode_first import encode_first
from megadit.training.events import Events, append_event
from megadit.training.initial import load_initial
from megadit.training.loop import Ending, Oversight, prepare_directory, resume, train
from megadit.training.progress import Progress

logger = logging.getLogger("megadit")

PATIENCE_S = 1200.0  # for another training in the same folder to end


def agree(process: Process, fault: str | None) -> bool:
    """Whether no rank found a fault; if some did, the lowest of them says what. Collective."""
    speaker = next((rank for rank, message in enumerate(gathered(fault)) if message is not None), None)
    if speaker == process.rank:
        print(f"megadit: {fault}", file=sys.stderr, flush=True)  # noqa: T201 (the one message of a refused start)
    dist.barrier()  # launchers end everyone when the first process exits, so exit after the message
    return speaker is None


def start(process: Process, path: str, overrides: Sequence[str], stops: StopRequests, watchdog: Watchdog) -> int:
    """Read and check everything that is read, then go on from the newest checkpoint. Collective."""
    asked: RunConfig | None = None
    config: RunConfig | None = None
    inputs: Inputs | None = None
    fault = None
    try:
        asked, config = load_checked(path, overrides, process.world_size)
    except ValueError as error:
        fault = str(error)
    if not agree(process, fault):
        return BAD_INPUT
    assert asked is not None and config is not None
    stops.limit(60 * config.guard.time_limit)
    try:
        config = encode_first(config, process, stops)
        inputs = read_inputs(config)
    except Ending as error:
        logger.error("process %d: %s", process.rank, error)
        return error.status
    except ValueError as error:
        fault = str(error)
    if not agree(process, fault):
        return BAD_INPUT
    assert inputs is not None
    watchdog.watch(config.watchdog, config.directory, partial(append_event, config.directory, "lost"))
    if config.run.deterministic:
        use_deterministic_kernels()
    progress, run, lock, events = Progress(), None, None, None
    try:
        run = build_run(config, Layout.of(config.parallel, process.world_size), inputs, process)
        lock = take(config.directory) if process.is_main else None
    except ValueError as error:
        fault = str(error)
    if not agree(process, fault):
        return BAD_INPUT
    assert run is not None
    try:
        progress = resume(run)
        if progress.step == 0 and config.run.init_from:
            load_initial(run)
        if progress.step < config.run.steps:
            events = prepare_directory(run)
    except ValueError as error:
        fault = str(error)
    if not agree(process, fault):
        return BAD_INPUT
    if progress.step >= config.run.steps:
        logger.info("%s is finished: step %d of %d", config.directory, progress.step, config.run.steps)
        return FINISHED
    assert events is not None
    introduce(run, asked, progress, events)
    stops.begin()
    try:
        train(run, progress, Oversight(events, stops, watchdog.progress))
    except Ending as error:
        if process.is_main:
            logger.error("%s", error)
        return error.status
    finally:
        events.close()
        if lock is not None:
            lock.close()
    return FINISHED


def introduce(run: Run, asked: RunConfig, progress: Progress, events: Events) -> None:
    """Say what begins, or goes on, and where. Collective."""
    config, process, layout = run.config, run.process, run.grid.layout
    hosts = sorted(set(gathered(socket.gethostname())))
    if config.parallel != asked.parallel:
        wanted = f"tensor {asked.parallel.tensor} x pipeline {asked.parallel.pipeline} x expert {asked.parallel.expert}"
        reason = f"{wanted} does not fit {process.world_size} processes, a layout of parallel.fallbacks does: {layout}"
        events.tell("layout", progress.step, reason)
        if process.is_main:
            logger.warning("%s", reason)
    begins = progress.step == 0
    reason = "a new run" if begins else f"from the checkpoint of step {progress.step}"
    events.tell("start" if begins else "resume", progress.step, reason, layout=asdict(layout),
                world_size=process.world_size, hosts=hosts)  # fmt: skip
    if process.is_main and isinstance(run.inputs.train, Mixture) and (cut := run.inputs.train.num_too_long()):
        logger.warning("%d stored captions are cut to text.length=%d tokens", cut, config.text.length)
    parameters = sum(parameter.numel() for _, parameter in run.named)
    logger.info("%s: %s, %s, %s, %d parameters on process 0", config.directory, layout, process.device.type,
                config.run.dtype, parameters)  # fmt: skip


def take(folder: Path) -> IO[str]:
    """The lock of a run's folder. Raises ValueError when the folder cannot be written or stays in use."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder / "lock", PATIENCE_S)
    except OSError as error:
        raise ValueError(f"run.dir={folder} cannot be written: {error.strerror}") from error
