"""Does a run draw the shapes it is asked for? A judge reads shapes, colours, counts and places off its pictures.

Prompts are of the run's own tasks (data.tasks): combinations that training shows, and others that it never does. The
score is the mean over tasks of the fraction of pictures that show exactly what was asked for, as GenEval's.

    python tools/judge_shapes.py runs/shapes --trained 100 --heldout 40
    torchrun --standalone --nproc-per-node 4 tools/judge_shapes.py runs/shapes     # on four GPUs, the same pictures
    python tools/judge_shapes.py runs/shapes --show                                # an earlier result
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megadit.data.shapes.scene import TASKS
from megadit.runtime.disk import replace_file
from megadit.runtime.launch import process_group
from megadit.runtime.log import setup_logging
from megadit.sampling.picture import save_grid
from megadit.study.record import SCORE_FILE
from megadit.study.scoring import asks, score
from megadit.training.restore import Sampler, open_sampler

PICTURES_PER_CALL = 60
SHEET = 60  # pictures on the sheet, at most


def summary(result: dict[str, Any]) -> list[str]:
    """What to print; the last line is the score."""
    lines = [f"{'':<14}{'trained':>16}{'held out':>16}"]
    for task, kinds in result["tasks"].items():
        cells = [f"{k['right']}/{k['asked']} {k['right'] / k['asked']:.3f}" for k in kinds.values()]
        lines.append(f"{task:<14}" + "".join(f"{cell:>16}" for cell in cells))
    lines += [f"{count} wrong: {fault}" for fault, count in result["faults"].items()]
    heldout = "" if result["score_heldout"] is None else f"; held-out combinations: {result['score_heldout']:.3f}"
    return [*lines, f"score: {result['score']:.3f}{heldout}"]


def shapes_sampler(run: Path, process: Any) -> Sampler:
    """Raises ValueError for a run on other data."""
    sampler = open_sampler(run, process)
    if sampler.config.data.kind != "shapes":
        raise ValueError(f"{run} is a run on data.kind={sampler.config.data.kind}, and this judge reads shapes alone")
    return sampler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--trained", type=int, default=100, help="pictures per task of combinations that training shows"
    )
    parser.add_argument("--heldout", type=int, default=40, help="pictures per task of held-out combinations")
    parser.add_argument("--seed", type=int, default=1, help="of the noise (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps; default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the run's sample.guidance")
    parser.add_argument("--out", type=Path, help=f"the JSON to write; default: {SCORE_FILE} in the run's folder")
    parser.add_argument("--sheet", type=Path, help="a PNG of the first pictures of each task")
    parser.add_argument("--show", action="store_true", help="print an earlier result instead of judging again")
    args = parser.parse_args()
    for option in ("trained", "heldout"):
        if getattr(args, option) < (option == "trained"):
            parser.error(f"--{option} {getattr(args, option)} is too few")
    out = args.out or args.run / SCORE_FILE
    if args.show:
        try:
            print("\n".join(summary(json.loads(out.read_text()))))
        except (OSError, ValueError, KeyError) as error:
            print(f"judge_shapes: {out}: {error}", file=sys.stderr)
            return 2
        return 0
    with process_group() as process:
        setup_logging(process.rank)
        try:
            sampler = shapes_sampler(args.run, process)
        except ValueError as error:
            if process.is_main:
                print(f"judge_shapes: {error}", file=sys.stderr)
            return 2
        tasks = sampler.config.data.tasks or TASKS
        asked = asks(tasks, args.trained, args.heldout)
        settings = replace(
            sampler.config.sample,
            **{key: value for key in ("steps", "guidance") if (value := getattr(args, key)) is not None},
        )
        with tqdm(total=len(asked), desc="pictures", dynamic_ncols=True, disable=not process.is_main) as bar:
            drawn = sampler.draw_all(
                [ask.prompt for ask in asked],
                settings,
                args.seed,
                batch=PICTURES_PER_CALL,
                drawn=lambda pictures: bar.update(len(pictures)),
            )
    if process.is_main:
        result = score(drawn, asked) | {"step": sampler.step, "seed": args.seed, "sample": asdict(settings)}
        replace_file(out, (json.dumps(result, indent=2) + "\n").encode())
        if args.sheet:
            first = [i for i, ask in enumerate(asked) if ask.kind == "trained"]
            save_grid(drawn[first[:: max(1, len(first) // SHEET)][:SHEET]], args.sheet, columns=12, zoom=2)
        print("\n".join(summary(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
