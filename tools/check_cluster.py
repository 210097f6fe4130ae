"""Prove a cluster before a long run: start this as the training will be started, with as many processes.

    torchrun --standalone --nproc-per-node 8 tools/check_cluster.py
    srun --kill-on-bad-exit=1 python tools/check_cluster.py --layout tensor=2,expert=8,pipeline=2 --json cluster.json
    deepspeed --hostfile hosts tools/check_cluster.py

Each check runs on all ranks at once, and rank 0 prints a line for it as it ends:

  arrival      every rank came
  versions     the same megadit (its source files too), torch, NCCL, driver, GPU and pinned packages everywhere
  clock        how far the hosts' clocks are apart
  memory       as much free memory on each rank; it keeps what is written
  compute      no rank is slower than the others, in matrix products and in a training step that it makes alone
  groups       every group of every layout connects
  collectives  every collective brings every rank the right blocks; a wrong one names its sender and its receiver
  bandwidth    latency and bandwidth of every axis' groups; which group is behind its peers
  hops         pipeline hops while all-to-alls are under way do not wait for one another
  parity       a small EC-DiT trains in every layout as one process does: float64 to 1e-9, float32 with ZeRO-1 to 2e-5

Without --layout a few layouts are tried that bring every axis on; give those that you will train in. A check that does
not end in --limit seconds fails, with the ranks that the others wait for. FAULT lines name the rank, host and device.
The exit status is 0 when all passed, 1 when a check failed, 2 for bad arguments. (torchrun's own status is 1 for both.)
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from megadit.parallel.layout import ParallelConfig
from megadit.preflight.layouts import default_layouts, parse_layout
from megadit.preflight.names import NAMES
from megadit.runtime.environment import LaunchError, discover
from megadit.runtime.tool import refuse_early

PASSED, FAILED, BAD_INPUT = 0, 1, 2
MIB = 2**20


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", default=[], metavar="KEY=VALUE,...",
                        help="degrees and options of parallel.* to try, such as tensor=2,pipeline=2,schedule=zbv; "
                             "may be given several times (default: a few)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer repeats, rounds and steps")
    parser.add_argument("--only", metavar="CHECK,...", help=f"these checks alone, of {', '.join(NAMES)}")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each check (default: %(default).0f)")
    parser.add_argument("--slow-factor", type=float, default=1.5,
                        help="a slow rank takes so many times the ranks' median (default: %(default)s)")  # fmt: skip
    parser.add_argument("--group-factor", type=float, default=3.0,
                        help="a slow group takes so many times its axis' median (default: %(default)s)")  # fmt: skip
    parser.add_argument("--memory-factor", type=float, default=0.8,
                        help="a rank must have so much of the median's free memory (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-skew", type=float, default=1.0,
                        help="seconds that clocks may be apart without a warning (default: %(default)s)")  # fmt: skip
    parser.add_argument("--memory-test", type=int, default=0, metavar="MIB",
                        help="memory to write and read on each rank (default: 1024 on a GPU, 32 on a CPU)")  # fmt: skip
    parser.add_argument("--largest-message", type=int, default=0, metavar="MIB",
                        help="of the bandwidths (default: 256 on GPUs, 4 on CPUs)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there too")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_args(argv)


def chosen_checks(names: str | None) -> list[str]:
    """Raises ValueError for a check that is not there."""
    chosen = list(NAMES) if names is None else names.split(",")
    for name in chosen:
        if name not in NAMES:
            raise ValueError(f"--only {name}: the checks are {', '.join(NAMES)}")
    return chosen


def checked_layouts(args: argparse.Namespace, world_size: int) -> tuple[ParallelConfig, ...]:
    """The layouts to try. Raises ValueError for what can be refused before torch is imported."""
    for name in ("limit", "slow_factor", "group_factor", "memory_factor", "max_skew"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be more than 0")
    if args.memory_test < 0 or args.largest_message < 0:
        raise ValueError("--memory-test and --largest-message must be 0 or more")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json}: that is a folder, or there is no folder {args.json.parent}")
    layouts = tuple(dict.fromkeys(parse_layout(text, world_size) for text in args.layout))
    chosen_checks(args.only)
    return layouts or tuple(default_layouts(world_size))


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("check_cluster", lambda: checked_layouts(arguments(None), 1))

import torch

from megadit.preflight.checks import CHECKS
from megadit.preflight.layouts import label
from megadit.preflight.rollcall import RollCall, Silence
from megadit.preflight.runner import run_checks
from megadit.preflight.station import Settings, Station
from megadit.preflight.training import EXACT, configuration
from megadit.preflight.verdict import Report
from megadit.runtime.launch import Process, process_group
from megadit.runtime.log import setup_logging
from megadit.training.config import check


def settings_of(args: argparse.Namespace, world_size: int) -> Settings:
    """Raises ValueError for what cannot be."""
    layouts = checked_layouts(args, world_size)
    for chosen in layouts:
        try:
            check(configuration(layouts, world_size, chosen, EXACT, steps=1), world_size)
        except ValueError as error:
            raise ValueError(f"the layout {label(chosen, world_size)}: {error}") from error
    return Settings(
        layouts=layouts,
        limit_s=args.limit,
        slow_factor=args.slow_factor,
        group_factor=args.group_factor,
        memory_factor=args.memory_factor,
        max_skew_s=args.max_skew,
        memory_test=args.memory_test * MIB,
        largest_message=args.largest_message * MIB,
        quick=args.quick,
    )


def main(argv: Sequence[str] | None = None) -> int:
    try:
        rank, world_size, _ = discover(os.environ)
    except LaunchError as error:
        print(f"check_cluster: {error}", file=sys.stderr)
        return BAD_INPUT
    # All ranks have the same arguments: one of them says what is wrong with them.
    with contextlib.ExitStack() as stack:
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        args = arguments(argv)
        try:
            settings, names = settings_of(args, world_size), chosen_checks(args.only)
        except ValueError as error:
            print(f"check_cluster: {error}", file=sys.stderr)
            return BAD_INPUT
    try:
        # Our limits come first: torch's own would end the process before it could say who is missing.
        with process_group(timedelta(seconds=settings.limit_s + 120), timedelta(seconds=settings.limit_s)) as process:
            setup_logging(process.rank)
            report = examine(process, settings, names, args.json)
            if report.hung:
                sys.stdout.flush()
                os._exit(FAILED)  # a thread hangs in a collective, and would keep this process
            return PASSED if report.passed else FAILED
    except (Silence, torch.distributed.DistNetworkError) as error:  # rank 0 is gone
        print(f"check_cluster: rank {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(FAILED)
    except LaunchError as error:
        print(f"check_cluster: {error}", file=sys.stderr)
        return FAILED


def examine(process: Process, settings: Settings, names: Sequence[str], out: Path | None = None) -> Report:
    """Run the checks of these names and print the report on rank 0. Collective."""
    begin = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)

    if process.is_main:
        backend = torch.distributed.get_backend()
        shown = "; ".join(label(each, process.world_size) for each in settings.layouts)
        say(f"check_cluster: {process.world_size} ranks, {backend}, torch {torch.__version__}; layouts: {shown}")
    station = Station(process, settings)
    rollcall = RollCall(process.rank, process.world_size)
    report = run_checks(station, [each for each in CHECKS if each.name in names], rollcall, say)
    if process.is_main:
        say(f"{report.conclusion()} ({time.monotonic() - begin:.0f} s)")
        if out is not None:
            members = [asdict(member) for member in station.members]
            everything = {"settings": asdict(settings), "members": members, **report.to_dict()}
            out.write_text(json.dumps(everything, indent=1) + "\n")
    rollcall.dismiss(settings.limit_s)
    return report


if __name__ == "__main__":
    sys.exit(main())
