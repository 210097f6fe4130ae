"""Prompts to a PNG grid, from the averaged weights of a run's newest checkpoint.

python tools/sample.py runs/digits --out seven.png "a handwritten seven" "the digit 7 in ink"
python tools/sample.py runs/digits_class --out sevens.png 7 --repeat 10
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megadit.data.loader import open_dataset
from megadit.runtime.launch import process_group
from megadit.runtime.log import setup_logging
from megadit.sampling.generate import SampleConfig
from megadit.sampling.picture import save_grid
from megadit.training.restore import open_sampler

PROMPTS = """what to draw: captions, or numbers of classes if the run is conditioned on classes;
default: the data set's held-out ones"""


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("prompts", nargs="*", help=PROMPTS)
    parser.add_argument("--out", type=Path, help="the PNG to write; default: samples.png in the run's folder")
    parser.add_argument(
        "--count", type=positive, default=40, help="pictures when no prompt is given (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=positive, default=1, help="pictures of each prompt (default: %(default)s)")
    parser.add_argument("--columns", type=positive, default=10, help="pictures in a row (default: %(default)s)")
    parser.add_argument("--zoom", type=positive, default=6, help="width of a pixel (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--steps", type=positive, help="sampling steps; default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is none; default: the run's sample.guidance")
    parser.add_argument("--sampler", choices=("euler", "heun"), help="default: the run's sample.sampler")
    args = parser.parse_intermixed_args()
    with process_group() as process:
        setup_logging(process.rank)
        try:
            sampler = open_sampler(args.run, process)
            data, conditioning = sampler.config.data, sampler.config.model.conditioning
            prompts = args.prompts or open_dataset(data, "heldout", conditioning).prompts(args.count)
            prompts = [prompt for prompt in prompts for _ in range(args.repeat)]
            default = sampler.config.sample
            settings = SampleConfig(
                sampler=args.sampler or default.sampler,
                steps=args.steps or default.steps,
                guidance=default.guidance if args.guidance is None else args.guidance,
                shift=default.shift,
            )
            bar = partial(tqdm, desc=f"{len(prompts)} pictures", unit="step", dynamic_ncols=True)
            images = sampler.draw(prompts, settings, args.seed, progress=bar)
        except ValueError as error:
            if process.is_main:
                print(f"sample: {error}", file=sys.stderr)
            return 2
        if process.is_main:
            out = args.out or args.run / "samples.png"
            out.parent.mkdir(parents=True, exist_ok=True)
            save_grid(images, out, args.columns, args.zoom)
            print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
