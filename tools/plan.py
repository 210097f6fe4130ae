"""Says what a configuration needs on a cluster that nobody has to start: memory, communication, time.

    python tools/plan.py --config examples/configs/ec_dit_m_64e.yaml --world 512 --gpu h100
    python tools/plan.py --config examples/configs/ec_dit_m_64e.yaml --world 512 --gpu h100 --search --html plan.html

docs/planning.md explains every term.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megadit.planning.hardware import GPUS, SPARE, Gpu, load_gpu
from megadit.runtime.tool import refuse_early
from megadit.training.config import RunConfig, load_config

BAD_INPUT, DOES_NOT_FIT = 2, 1  # exit statuses
SHOWN = 10  # layouts of a search, and reasons


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/plan.py",
        description="Memory, communication and time of a configuration on a cluster, without the cluster. The exit "
        "status is 0 when it fits, 1 when it does not, 2 for bad input.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="X.yaml", help="the run's configuration")
    parser.add_argument("--world", type=int, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", default="h100", help=f"{' | '.join(GPUS)} | a YAML file, such as calibrate.py writes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--search", action="store_true", help="look at all layouts, and rank those that fit")
    parser.add_argument("--spare", type=float, default=SPARE, help="part of the memory to leave free (%(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots, readable on its own")
    parser.add_argument("--sizes", action="store_true", help="print the sizes of the paper beside ours, and no plan")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="what differs from the file")
    return parser.parse_intermixed_args(argv)


def read(args: argparse.Namespace) -> tuple[Gpu, RunConfig]:
    """What is read. Raises ValueError for what can be refused before torch is imported."""
    if args.config is None or args.world is None:
        raise ValueError("--config and --world are needed; --sizes does without")
    if args.world < 1:
        raise ValueError(f"--world {args.world} must be 1 or more")
    if not 0 <= args.spare < 1:
        raise ValueError(f"--spare {args.spare} must be at least 0 and less than 1")
    return load_gpu(args.gpu), load_config(args.config, args.overrides)


if __name__ == "__main__":  # before the imports below, which take seconds
    args = arguments(None)
    if not args.sizes:
        refuse_early("plan", partial(read, args))

from tqdm import tqdm

from megadit.model.count import residuals
from megadit.planning.dry_run import check_plannable, table
from megadit.planning.plan import Plan, Planner
from megadit.planning.search import Candidate, differences, does_not_fit, nearest, search
from megadit.planning.simulation import fake_world
from megadit.planning.summary import lines, to_dict


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.sizes:
        print("\n".join(sizes()))
        return 0
    try:
        return run(args)
    except (OSError, ValueError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return BAD_INPUT


def sizes() -> list[str]:
    rows = [(r.name, f"{r.ours / 1e9:.3f}", f"{r.paper / 1e9:.2f}", f"{r.ratio - 1:+.2%}") for r in residuals()]
    return list(table(("size", "ours, billions", "paper's", "difference"), rows))


def run(args: argparse.Namespace) -> int:
    gpu, config = read(args)
    if args.search:
        found = search_with_bar(config, args.world, gpu, args.spare)
        best = found[0].plan if found and not found[0].reason else None
        if args.json:
            print(json.dumps([as_row(candidate) for candidate in found]))
        else:
            print("\n".join(ranking(found, args.spare)))
        if best is not None and args.html:
            write_report(args.html, best, found)
        return 0 if best is not None else DOES_NOT_FIT
    layout = check_plannable(config, args.world)
    with fake_world(0, args.world):
        plan = Planner(gpu).plan(config, layout)
    print(json.dumps(to_dict(plan), indent=1) if args.json else "\n".join(lines(plan)))
    if args.html:
        write_report(args.html, plan, [])
    reason = does_not_fit(plan, 0.0)
    if reason:
        print("\n".join(way_out(plan, reason, args)), file=sys.stderr)
        return DOES_NOT_FIT
    return 0


def way_out(plan: Plan, reason: str, args: argparse.Namespace) -> list[str]:
    """Why it does not fit, and the nearest layout that does."""
    found = search_with_bar(plan.config, args.world, plan.gpu, args.spare)
    near = nearest(plan, found)
    if near is None:
        return [f"plan: {reason}", "plan: no layout fits; take more GPUs, or a smaller data.global_batch or model"]
    return [f"plan: {reason}", f"plan: the nearest layout that fits: {' '.join(differences(plan.config, near.config))}"]


def search_with_bar(config: RunConfig, world_size: int, gpu: Gpu, spare: float) -> list[Candidate]:
    with tqdm(unit="group", desc="layouts", file=sys.stderr, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return search(config, world_size, gpu, spare, progress=progress)


def as_row(candidate: Candidate) -> dict[str, object]:
    plan = candidate.plan
    known = {} if plan is None else {"seconds": plan.seconds, "mfu": plan.mfu, "peak_bytes": plan.peak}
    return {"layout": str(candidate), "fits": not candidate.reason, "reason": candidate.reason, **known}


def ranking(found: Sequence[Candidate], spare: float) -> list[str]:
    """The fastest layouts that fit, and examples of why others do not."""
    fitting = [candidate for candidate in found if not candidate.reason]
    text = [f"{len(fitting)} of {len(found)} layouts fit with {spare:.0%} to spare; the fastest:"]
    rows = [
        (str(candidate), f"{plan.seconds:.3f}", f"{plan.mfu:.1%}", f"{plan.peak / 1e9:.1f}")
        for candidate in fitting[:SHOWN]
        if (plan := candidate.plan) is not None
    ]
    text += table(("layout", "s per step", "MFU", "peak GB"), rows)
    reasons: dict[str, list[Candidate]] = {}
    for candidate in found:
        if candidate.reason:
            reasons.setdefault(kind_of_reason(candidate), []).append(candidate)
    for kind, refused in sorted(reasons.items(), key=lambda item: -len(item[1])):
        text.append(f"{len(refused)} {kind}, such as {refused[0]}: {refused[0].reason}")
    return text


def kind_of_reason(candidate: Candidate) -> str:
    if candidate.plan is not None:
        return "do not fit with their activations"
    return "do not fit without activations" if "optimizer alone" in candidate.reason else "cannot be"


def write_report(path: Path, plan: Plan, found: Sequence[Candidate]) -> None:
    from megadit.planning.report import report

    path.write_text(report(plan, found), encoding="utf-8")
    print(f"plan: wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
