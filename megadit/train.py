"""The entry point: python -m megadit.train --config X.yaml [section.key=value ...]

Started by torchrun, the deepspeed launcher, srun, or by itself as one process.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megadit.runtime.launch import LaunchError, Process, discover, process_group
from megadit.runtime.lock import hold
from megadit.runtime.log import setup_logging
from megadit.runtime.seed import use_deterministic_kernels
from megadit.runtime.watchdog import Watchdog
from megadit.training.build import Inputs, build_run, read_inputs
from megadit.training.config import RunConfig, check, describe, load_config
from megadit.training.events import append_event
from megadit.training.initial import load_initial
from megadit.training.loop import Diverged, Unsaved, prepare_directory, resume, train

logger = logging.getLogger("megadit")

DIVERGED, BAD_INPUT, UNSAVED = 1, 2, 3  # exit statuses
PATIENCE_S = 1200.0  # for another training in the same folder to end


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megadit.train",
        description="Train an EC-DiT. A run that was stopped goes on from its newest checkpoint, by the same command.",
        epilog="sections and keys, with their defaults:\n" + describe(),
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
    faults: list[str | None] = [None] * process.world_size
    dist.all_gather_object(faults, fault)
    speaker = next((rank for rank, message in enumerate(faults) if message is not None), None)
    if speaker == process.rank:
        print(f"megadit: {fault}", file=sys.stderr, flush=True)  # noqa: T201 (the one message of a refused start)
    dist.barrier()  # launchers end everyone when the first process exits, so exit after the message
    return speaker is None


def main(argv: Sequence[str] | None = None) -> int:
    """Train. Returns the exit status: 0; 1 when the training diverged; 2 when the input was refused;
    3 when the last checkpoint could not be written.
    """
    args = arguments(argv)
    if args.dry_run:
        return play(args)
    try:
        with process_group() as process, Watchdog(process) as watchdog:
            setup_logging(process.rank)
            return start(process, watchdog, args.config, args.overrides)
    except LaunchError as error:
        print(f"megadit: {error}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT


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


def start(process: Process, watchdog: Watchdog, path: str, overrides: Sequence[str]) -> int:
    """Read and check everything that is read, then go on from the newest checkpoint. Collective."""
    config: RunConfig | None = None
    inputs: Inputs | None = None
    fault = None
    try:
        config = load_config(path, overrides)
        layout = check(config, process.world_size)
        inputs = read_inputs(config)
    except ValueError as error:
        fault = str(error)
    if not agree(process, fault):
        return BAD_INPUT
    assert config is not None and inputs is not None
    watchdog.watch(config.watchdog, config.directory, partial(append_event, config.directory, "lost"))
    if config.run.deterministic:
        use_deterministic_kernels()
    step, run, lock = 0, None, None
    try:
        run = build_run(config, layout, inputs, process)
        lock = take(config.directory) if process.is_main else None
    except ValueError as error:
        fault = str(error)
    if not agree(process, fault):
        return BAD_INPUT
    assert run is not None
    try:
        step = resume(run)
        if step == 0 and config.run.init_from:
            load_initial(run)
        if step < config.run.steps:
            prepare_directory(run)
    except ValueError as error:
        fault = str(error)
    if not agree(process, fault):
        return BAD_INPUT
    if step >= config.run.steps:
        logger.info("%s is finished: step %d of %d", config.directory, step, config.run.steps)
        return 0
    parameters = sum(parameter.numel() for _, parameter in run.named)
    logger.info("%s: %s, %s, %s, %d parameters on process 0", config.directory, layout, process.device.type,
                config.run.dtype, parameters)  # fmt: skip
    try:
        train(run, step, watchdog.progress)
    except (Diverged, Unsaved) as error:
        if process.is_main:
            logger.error("%s", error)
        return DIVERGED if isinstance(error, Diverged) else UNSAVED
    finally:
        if lock is not None:
            lock.close()
    return 0


def take(folder: Path) -> IO[str]:
    """The lock of a run's folder. Raises ValueError when the folder cannot be written or stays in use."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder / "lock", PATIENCE_S)
    except OSError as error:
        raise ValueError(f"run.dir={folder} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
