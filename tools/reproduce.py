"""Trains what a study compares, judges it, and reports it with intervals.

    python tools/reproduce.py run examples/reproduce/cpu.yaml
    python tools/reproduce.py report docs/reproduction.md

`run` goes on where it was stopped: what is finished is not repeated, and a training goes on from its last checkpoint.
Each trial leaves a small record in OUT/records; `report` fills the marked parts of a page from the records that they
name, and nothing else of it, and draws the figures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from megadit.runtime.lock import hold
from megadit.study.design import Failed, read_study, trials

JUDGE = Path(__file__).resolve().with_name("judge_shapes.py")


def run(args: argparse.Namespace) -> None:
    study = read_study(args.study)
    # A study that is refused needs none of this, which takes seconds.
    import torch

    from megadit.study.conduct import RECORDS, Conductor, check_no_others, is_finished, places, steps_done

    every = list(trials(study, args.study))
    out = args.out or Path("runs/reproduce") / study.name
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / ".lock", patience_s=10):
        check_no_others(out, every)
        labels = {name: variant.label for name, variant in study.variants.items()}
        left = [trial for trial in every if not is_finished(out, trial, labels[trial.variant], study.judge)]
        total = sum(trial.config().run.steps for trial in left)
        done = sum(steps_done(out / trial.name) for trial in left)
        name = f"{len(left)} of {len(every)} trials"
        with tqdm(total=total, initial=done, desc=name, unit="step", dynamic_ncols=True, smoothing=0.02) as bar:
            where = places(args.workers, torch.cuda.device_count(), len(left))
            Conductor(study, out, where, JUDGE, bar.update).conduct(left)
    print(out / RECORDS)


def report(args: argparse.Namespace) -> None:
    from megadit.study.page import fill

    changed = fill(args.page, write=not args.check)
    if args.check and changed:
        raise ValueError(f"{args.page} is not what its records say: {', '.join(changed)}; run without --check")
    print(args.page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="train and judge every trial of a study that is not finished")
    running.add_argument("study", type=Path, help="a YAML file: base, variants, seeds; see megadit/study/design.py")
    running.add_argument("--out", type=Path, help="folder of the runs and their records; default: runs/reproduce/NAME")
    running.add_argument("--workers", type=int, default=0, help="trials side by side; default: one a GPU, or a core")
    running.set_defaults(command=run)
    reporting = commands.add_parser("report", help="fill a page's marked parts from records")
    reporting.add_argument("page", type=Path, help="a Markdown page")
    reporting.add_argument("--check", action="store_true", help="write nothing: fail if the page would change")
    reporting.set_defaults(command=report)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # trials are stopped on the way out
    try:
        args.command(args)
    except (ValueError, OSError, Failed) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
