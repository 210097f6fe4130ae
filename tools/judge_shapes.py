"""Does a run draw the shapes it is asked for? A judge reads shapes, colours, counts and places off its pictures.

Prompts are of the run's own tasks and shapes (data.tasks, data.shapes): combinations that training shows, and others
that it never does. The score is the mean over tasks of the fraction of pictures that show exactly what was asked for,
as GenEval's.

    python tools/judge_shapes.py runs/shapes --trained 100 --heldout 40
    torchrun --standalone --nproc-per-node 4 tools/judge_shapes.py runs/shapes     # on four GPUs, the same pictures
    torchrun --standalone --nproc-per-node 4 tools/judge_shapes.py runs/large --tensor 2 --expert 2
    python tools/judge_shapes.py runs/shapes --show                                # an earlier result
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megadit.evaluation.results import show, write_json
from megadit.runtime.tool import refuse_early, run_tool
from megadit.sampling import options
from megadit.study.design import SCORE_FILE
from megadit.training.drawn import read_asked

PICTURES_PER_CALL = 60
SHEET = 60  # pictures on the sheet, at most


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--trained",
        type=options.positive,
        default=100,
        help="pictures per task of combinations that training shows (default: %(default)s)",
    )
    parser.add_argument(
        "--heldout",
        type=int,
        default=40,
        help="pictures per task of combinations that it never does, 0 is none (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help=f"the JSON to write; default: {SCORE_FILE} in the run's folder")
    parser.add_argument("--sheet", type=options.png, help=f"a PNG of up to {SHEET} pictures, evenly over the tasks")
    parser.add_argument("--show", action="store_true", help="print an earlier result instead of judging again")
    options.add_launcher(parser)
    options.add_drawing(parser, seed=1)
    options.add_batch(options.add_layout(parser), PICTURES_PER_CALL)
    args = parser.parse_args()
    if args.heldout < 0:
        parser.error(f"--heldout {args.heldout} is less than 0")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds
    args = arguments()
    if not args.show:
        refuse_early("judge_shapes", partial(read_asked, args, 1), options.spoken)

from torch import Tensor
from tqdm import tqdm

from megadit.data.shapes.scene import SHAPES, TASKS
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.agreement import of_main
from megadit.runtime.launch import Process
from megadit.sampling.config import SampleConfig
from megadit.sampling.folder import check_writable, writing
from megadit.sampling.picture import save_grid
from megadit.study.scoring import Ask, asks, score
from megadit.training.restore import Sampler, open_sampler


def summary(result: dict[str, Any]) -> list[str]:
    """What to print; the last line is the score."""
    lines = [f"{'':<14}{'trained':>16}{'held out':>16}"]
    for task, kinds in result["tasks"].items():
        cells = [f"{k['right']}/{k['asked']} {k['right'] / k['asked']:.3f}" for k in kinds.values()]
        lines.append(f"{task:<14}" + "".join(f"{cell:>16}" for cell in cells))
    lines += [f"{count} wrong: {fault}" for fault, count in result["faults"].items()]
    heldout = "" if result["score_heldout"] is None else f"; held-out combinations: {result['score_heldout']:.3f}"
    return [*lines, f"score: {result['score']:.3f}{heldout}"]


def shapes_sampler(args: argparse.Namespace, process: Process) -> Sampler:
    """Raises ValueError for a run on other data."""
    sampler = open_sampler(
        args.run, process, options.asked(args, ParallelConfig()), sample=options.given(args, SampleConfig)
    )
    kind = sampler.config.data.kind
    if kind != "shapes":
        raise ValueError(f"{args.run} is a run on data.kind={kind}, and this judge reads shapes alone")
    return sampler


def run(args: argparse.Namespace, out: Path, process: Process) -> None:
    """Draw, judge, write and print. Collective; raises ValueError on all ranks."""
    for path in (out, args.sheet):
        if path:
            of_main(partial(check_writable, path))
    sampler = shapes_sampler(args, process)
    settings = sampler.config.sample
    data = sampler.config.data
    wanted = asks(dict.fromkeys(data.tasks or TASKS), args.trained, args.heldout, data.shapes or SHAPES)
    with tqdm(total=len(wanted), desc="pictures", dynamic_ncols=True, disable=not process.is_main) as bar:
        drawn_NCHW = sampler.draw_all(
            [ask.prompt for ask in wanted],
            settings,
            args.seed,
            batch=args.batch,
            drawn=lambda pictures: bar.update(len(pictures)),
        )

    def judged() -> None:
        result = score(drawn_NCHW, wanted) | {"step": sampler.step, "seed": args.seed, "sample": asdict(settings)}
        write_json(out, result)
        if args.sheet:
            write_sheet(drawn_NCHW, wanted, args.sheet)
        print("\n".join(summary(result)))

    of_main(judged)


def write_sheet(drawn_NCHW: Tensor, wanted: Sequence[Ask], path: Path) -> None:
    """Pictures of combinations that training shows, of all tasks. Raises ValueError naming a file that cannot be
    written.
    """
    first = [i for i, ask in enumerate(wanted) if ask.kind == "trained"]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        count = min(SHEET, len(first))
        save_grid(drawn_NCHW[[first[i * len(first) // count] for i in range(count)]], path, columns=12, zoom=2)


def main() -> int:
    args = arguments()
    out = args.out or args.run / SCORE_FILE
    if args.show:
        return show("judge_shapes", out, summary)
    return run_tool("judge_shapes", partial(run, args, out), options.spoken)


if __name__ == "__main__":
    sys.exit(main())
