"""The entry point: python -m megadit.train --config X.yaml [section.key=value ...]

Started by torchrun, the deepspeed launcher, srun, or by itself as one process. Its exit statuses: runtime/status.py.
"""

# ruff: noqa: E402 (the signals come first)
from __future__ import annotations

if __name__ == "__main__":
    from megadit.runtime.stopping import leave_on_signals

    leave_on_signals()  # until main listens

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from megadit.runtime.environment import LaunchError, NotMet, discover
from megadit.runtime.log import setup_logging
from megadit.runtime.status import BAD_INPUT, LOST
from megadit.runtime.stopping import StopRequests
from megadit.training.config import describe, load_checked, load_config

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


def main(argv: Sequence[str] | None = None) -> int:
    """Train. Returns the exit status, see `megadit.runtime.status`."""
    args = arguments(argv)
    if args.dry_run:
        return play(args)
    try:
        if discover(os.environ)[1] == 1:  # several processes meet first, so that one of them speaks
            load_checked(args.config, args.overrides, world_size=1)
    except ValueError as error:
        print(f"megadit: {error}", file=sys.stderr)  # noqa: T201 (the one message of a refused start)
        return BAD_INPUT
    stops = StopRequests()
    try:
        # Nothing above needs torch, which takes seconds to import.
        from megadit.runtime.launch import process_group
        from megadit.runtime.watchdog import Watchdog
        from megadit.training.start import start

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
    try:
        world_size = discover(os.environ)[1] if args.world is None else args.world
        config = load_config(args.config, args.overrides)
        from megadit.planning.dry_run import dry_run, ranks_to_play, report

        for rank in ranks_to_play(config, world_size, args.as_rank, args.all_stages):
            print("\n".join(report(dry_run(config, world_size, rank))), flush=True)  # noqa: T201
    except ValueError as error:
        print(f"megadit: {error}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(command())
