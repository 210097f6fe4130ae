"""Prompts to a PNG grid, from the averaged weights of a run's newest checkpoint.

python tools/sample.py runs/digits --out seven.png "a handwritten seven" "the digit 7 in ink"
python tools/sample.py runs/digits_class --out sevens.png 7 --repeat 10
python tools/sample.py runs/photographs --out cats.png "a tabby cat" --repeat 8 --size 256x320 --zoom 1

Of a run on encoded data sets, prompts are read by the text encoders that the data is of, and what is drawn is decoded
by its autoencoder: their names or folders are the configuration's, else those in the data set's manifest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megadit.data.loader import open_dataset
from megadit.data.stored import numbers
from megadit.encoders.condition import Condition
from megadit.runtime.launch import process_group
from megadit.runtime.log import setup_logging
from megadit.sampling.generate import SampleConfig
from megadit.sampling.picture import save_grid
from megadit.training.config import RunConfig
from megadit.training.encoded import Named, autoencoder_of
from megadit.training.restore import open_sampler

PROMPTS = """what to draw: captions, or numbers of classes if the run is conditioned on classes;
default: the data set's held-out ones"""


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number


def height_width(text: str) -> tuple[int, int]:
    """Two sides as 256x320, for argparse."""
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is not of the form HEIGHTxWIDTH, such as 256x320")
    return positive(height), positive(width)


def default_prompts(config: RunConfig, condition: Condition, count: int) -> list[str]:
    """Held-out captions or classes. Raises ValueError where the data has only what encoders made of its captions."""
    if config.data.kind != "shards":
        return open_dataset(config.data, "heldout", config.model.conditioning).prompts(count)
    return numbers(condition, count)


class Decoder(NamedTuple):
    """What makes pixels of latents. cell: pixels along one side of a latent's cell."""

    decode: Callable[[Tensor], Tensor]
    cell: int

    def latent_size(self, size: tuple[int, int] | None, patch: int) -> tuple[int, int] | None:
        """Raises ValueError for a size that cells and patches do not divide."""
        if size is None:
            return None
        step = self.cell * patch
        if size[0] % step or size[1] % step:
            raise ValueError(f"--size {size[0]}x{size[1]} must be multiples of {step} pixels")
        return size[0] // self.cell, size[1] // self.cell


def open_decoder(named: Named | None, device: torch.device, online: bool) -> Decoder:
    """That of an autoencoder; without one, latents are pixels. Raises ValueError if it is not there."""
    if named is None:
        return Decoder(lambda images_BCHW: images_BCHW, 1)
    from megadit.encoders.autoencoder import Autoencoder

    autoencoder = Autoencoder.load(named.name, device, torch.float32, named.revision, online)
    return Decoder(
        lambda latents_BCHW: torch.cat([autoencoder.decode(each) for each in latents_BCHW.split(1)]),
        autoencoder.downscale,
    )


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
    parser.add_argument("--size", type=height_width, metavar="HxW", help="in pixels; default: the model's square")
    parser.add_argument("--autoencoder", help="that decodes, by name or folder; default: that of the run's data")
    parser.add_argument("--online", action="store_true", help="download encoders that are not on this machine")
    args = parser.parse_intermixed_args()
    with process_group() as process:
        setup_logging(process.rank)
        try:
            sampler = open_sampler(args.run, process, online=args.online)
            config = sampler.config
            autoencoder = Named(args.autoencoder, "") if args.autoencoder else autoencoder_of(config)
            decoder = open_decoder(autoencoder, process.device, args.online)
            prompts = args.prompts or default_prompts(config, sampler.condition, args.count)
            prompts = [prompt for prompt in prompts for _ in range(args.repeat)]
            default = config.sample
            settings = SampleConfig(
                sampler=args.sampler or default.sampler,
                steps=args.steps or default.steps,
                guidance=default.guidance if args.guidance is None else args.guidance,
                shift=default.shift,
            )
            bar = partial(tqdm, desc=f"{len(prompts)} pictures", unit="step", dynamic_ncols=True)
            size = decoder.latent_size(args.size, config.model.patch)
            images = decoder.decode(sampler.draw(prompts, settings, args.seed, progress=bar, size=size))
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
