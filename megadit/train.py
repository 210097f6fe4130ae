"""The entry point: python -m megadit.train --config X.yaml [section.key=value ...]

Started by torchrun, the deepspeed launcher, srun, or by itself as one process. Its exit statuses: runtime/status.py.
"""

# ruff: noqa: E402 (the signals come first)
from __future__ import annotations

if __name__ == "__main__":
    from megadit.runtime.stopping import leave_on_signals

    leave_on_signals()  # the imports below take seconds

import argparse
import logging
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megadit.data.mixture import Mixture
from megadit.runtime.agreement import gathered
from megadit.runtime.environment import LaunchError, NotMet, discover
from megadit.runtime.launch import Process, process_group
from megadit.runtime.lock import hold
from megadit.runtime.log import setup_logging
from megadit.runtime.seed import use_deterministic_kernels
from megadit.runtime.status import BAD_INPUT, FINISHED, LOST
from megadit.runtime.stopping import StopRequests
from megadit.runtime.watchdog import Watchdog
from megadit.training.build import Inputs, Run, build_run, read_inputs
from megadit.training.config import RunConfig, check, check_inputs, describe, fit, load_config
from megadit.training.encode_first import encode_first
from megadit.training.events import Events, append_event
from megadit.training.initial import load_initial
from megadit.training.loop import Ending, Oversight, prepare_directory, resume, train
from megadit.training.progress import Progress

logger = logging.getLogger("megadit")

PATIENCE_S = 1200.0  # for another training in the same folder to end


ENDINGS = """exit statuses:
  0    the last step is done and saved
  1    the run diverges: too many losses or gradients are not finite, or spikes
  2    the input was refused, and nothing was written (but with data.kind=images, what was encoded)
  3    the last step is done, its checkpoint could not be written
  75   stopped by SIGTERM, SIGUSR1 or guard.time_limit, with a checkpoint of the last step, or while images are encoded
       with what is done: start again to go on
  76   a rank died, hangs, raised or has other parameters than its replicas: start again, from the newest checkpoint
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megadit.train",
        description="Train an EC-DiT. A run that was stopped goes on from its newest checkpoint, by the same command.",
        epilog=f"{ENDINGS}\nsections and keys, with their defaults:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="X.yaml", help="the run's configuration")
    parser.add_argument("--dry-run", action="store_true", help="play a step without numbers, and report what it needs")
    parser.add_argument("--world", type=int, metavar="N", help="dry run: the number of processes (default: this world)")
    parser.add_argument("--as-rank", type=int, metavar="R", help="dry run: the process to play (default: 0)")
    parser.add_argument("--all-stages", action="store_true", help="dry run: play one process of each pipeline rank")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="what differs from the file")
    return parser.parse_intermixed_args(argv)


def agree(process: Process, fault: str | None) -> bool:
    """Whether no rank found a fault; if some did, the lowest of them says what. Collective."""
    speaker = next((rank for rank, message in enumerate(gathered(fault)) if message is not None), None)
    if speaker == process.rank:
        print(f"megadit: {fault}", file=sys.stderr, flush=True)  # noqa: T201 (the one message of a refused start)
    dist.barrier()  # launchers end everyone when the first process exits, so exit after the message
    return speaker is None


def main(argv: Sequence[str] | None = None) -> int:
    """Train. Returns the exit status, see `megadit.runtime.status`."""
    args = arguments(argv)
    if args.dry_run:
        return play(args)
    stops = StopRequests()
    try:
        with process_group() as process, Watchdog(process) as watchdog:
            setup_logging(process.rank)
            return start(process, args.config, args.overrides, stops, watchdog)
    except LaunchError as error:
        print(f"megadit: {error}", file=sys.stderr)  # noqa: T201
        return LOST if isinstance(error, NotMet) else BAD_INPUT
    finally:
        stops.close()


def command() -> int:
    """Train, as a program: what nobody foresaw ends with status LOST, so that a scheduler starts it again."""
    try:
        return main()
    except Exception:
        traceback.print_exc()
        return LOST


def play(args: argparse.Namespace) -> int:
    """Dry runs, in this process alone. Returns the exit status."""
    from megadit.planning.dry_run import dry_run, ranks_to_play, report

    try:
        world_size = discover(os.environ)[1] if args.world is None else args.world
        config = load_config(args.config, args.overrides)
        for rank in ranks_to_play(config, world_size, args.as_rank, args.all_stages):
            print("\n".join(report(dry_run(config, world_size, rank))), flush=True)  # noqa: T201
    except ValueError as error:
        print(f"megadit: {error}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT
    return 0


def start(process: Process, path: str, overrides: Sequence[str], stops: StopRequests, watchdog: Watchdog) -> int:
    """Read and check everything that is read, then go on from the newest checkpoint. Collective."""
    asked: RunConfig | None = None
    config: RunConfig | None = None
    inputs: Inputs | None = None
    fault = None
    try:
        asked = load_config(path, overrides)
        config = fit(asked, process.world_size)
        layout = check(config, process.world_size)
        check_inputs(config)
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
        run = build_run(config, layout, inputs, process)
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


if __name__ == "__main__":
    sys.exit(command())
