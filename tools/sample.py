"""Prompts to pictures, from the averaged weights of a run's newest checkpoint.

One process, a grid of pictures:

    python tools/sample.py runs/digits --out seven.png "a handwritten seven" "the digit 7 in ink"
    python tools/sample.py runs/digits_class --out sevens.png 7 --repeat 10
    python tools/sample.py runs/photographs --out cats.png "a tabby cat" --repeat 8 --size 256x320 --zoom 1

A file of prompts, a line each, to a folder with a PNG for each picture. The same command goes on after a kill:

    python tools/sample.py runs/digits --prompts captions.txt --folder drawn
    sort -u captions.txt | python tools/sample.py runs/digits --prompts - --folder drawn

A model that is too large for one process, or many pictures: start it on several. Degrees are those of this drawing,
whatever the training had; data-parallel replicas are what is left, and share the pictures. A picture is the same in
every layout:

    torchrun --standalone --nproc-per-node 4 tools/sample.py runs/digits --tensor 2 --expert 2 --folder drawn
    srun --ntasks 8 --gpus-per-task 1 python tools/sample.py runs/large --pipeline 4 --prompts captions.txt --folder x
    deepspeed --num_accelerators 4 tools/sample.py runs/digits --prompts captions.txt --folder drawn

Of a run on encoded data sets, prompts are read by the text encoders that the data is of, and what is drawn is decoded
by its autoencoder: their names or folders are the configuration's, else those in the data set's manifest.

exit statuses: 0 done; 2 the input was refused, before anything was drawn, or a picture could not be written
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megadit.runtime.tool import refuse_early, run_tool
from megadit.sampling import options
from megadit.training.drawn import PICTURES_PER_CALL, read_asked

PROMPTS = """what to draw: captions, or numbers of classes if the run is conditioned on classes;
default: the data set's held-out ones"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("prompts", nargs="*", help=PROMPTS)
    options.add_launcher(parser)

    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--prompts", dest="prompts_file", metavar="FILE", help="a prompt a line, - is stdin; empty lines are skipped"
    )
    what.add_argument(
        "--count", type=options.positive, default=40, help="pictures when no prompt is given (default: %(default)s)"
    )
    what.add_argument(
        "--repeat", type=options.positive, default=1, help="pictures of each prompt (default: %(default)s)"
    )

    options.add_size(options.add_drawing(parser))

    where = parser.add_argument_group("where it is written")
    where.add_argument("--out", type=options.png, help="the grid, a PNG; default: samples.png in the run's folder")
    where.add_argument("--columns", type=options.positive, default=10, help="of the grid (default: %(default)s)")
    where.add_argument(
        "--zoom", type=options.positive, default=6, help="width of a pixel of the grid (default: %(default)s)"
    )
    where.add_argument(
        "--folder",
        type=Path,
        help="a PNG for each picture, 00000.png and so on, and prompts.jsonl that says what they are; what is there "
        "already is not drawn again; no grid then, unless --out asks for it too",
    )
    where.add_argument("--overwrite", action="store_true", help="draw all of --folder again, whatever is there")

    options.add_batch(options.add_layout(parser), PICTURES_PER_CALL)

    encoders = parser.add_argument_group("encoders")
    options.add_autoencoder(encoders)
    encoders.add_argument("--online", action="store_true", help="download encoders that are not on this machine")
    args = parser.parse_intermixed_args()
    if args.prompts and args.prompts_file:
        parser.error("prompts are given twice, as arguments and as --prompts; give them once")
    if args.overwrite and not args.folder:
        parser.error("--overwrite is for --folder; a grid is always written anew")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("sample", partial(read_asked, arguments(), 1), options.spoken)

import torch
from torch import Tensor
from tqdm import tqdm

from megadit.data.loader import open_dataset
from megadit.data.stored import numbers
from megadit.encoders.condition import Condition
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.agreement import of_main, together
from megadit.runtime.launch import Process
from megadit.sampling.config import SampleConfig
from megadit.sampling.folder import PictureFolder, check_writable, writing
from megadit.sampling.picture import save_grid
from megadit.sampling.prompts import read_prompts
from megadit.training.config import RunConfig, check_sizes
from megadit.training.decoder import Decoder, open_decoder
from megadit.training.restore import Sampler, open_sampler
from megadit.training.trained_sizes import warn_of_size


def default_prompts(config: RunConfig, condition: Condition, count: int) -> list[str]:
    """Held-out captions or classes. Raises ValueError where the data has only what encoders made of its captions."""
    if config.data.kind != "shards":
        return open_dataset(config.data, "heldout", config.model.conditioning).prompts(count)
    return numbers(condition, count)


@dataclass(frozen=True)
class Job:
    """Everything that is known before a picture is drawn, the same on every rank."""

    run: Path
    sampler: Sampler
    decoder: Decoder
    prompts: list[str]
    seed: int
    size: tuple[int, int] | None  # in latent cells
    batch: int
    is_main: bool

    @property
    def settings(self) -> SampleConfig:
        return self.sampler.config.sample

    def bar(self) -> tqdm:
        """Of pictures, all ranks' together; on the main process alone."""
        return tqdm(total=len(self.prompts), desc="pictures", dynamic_ncols=True, disable=not self.is_main)

    @property
    def how(self) -> dict[str, Any]:
        """The keyword arguments of `Sampler.shares` and `draw_all`."""
        steps = partial(tqdm, desc="steps", leave=False, dynamic_ncols=True, disable=not self.is_main)
        return {"batch": self.batch, "size": self.size, "progress": steps}

    def about(self) -> dict[str, Any]:
        """What pictures depend on, beside prompts, seed and index: JSON."""
        size = self.size or self.sampler.image_shape[1:]
        return {
            "run": str(self.run),
            "step": self.sampler.step,
            "height": size[0] * self.decoder.cell,
            "width": size[1] * self.decoder.cell,
            "autoencoder": self.decoder.name,
            "dtype": self.sampler.config.run.dtype,
            **asdict(self.settings),
        }


def prepare(args: argparse.Namespace, process: Process) -> Job:
    """Read and check everything. Collective; raises ValueError on all ranks, for a layout before anything is loaded."""
    parallel, sample = options.asked(args, ParallelConfig()), options.given(args, SampleConfig)
    with together():
        config = read_asked(args, process.world_size)
    prompts = of_main(lambda: read_prompts(args.prompts_file) if args.prompts_file else args.prompts)
    for path in (args.folder, grid_path(args)):
        if path:
            of_main(partial(check_writable, path))
    with together():
        decoder = open_decoder(config, args.autoencoder, process.device, args.online)
        size = decoder.latent_size(args.size, config.model.patch)
        check_sizes(config, [size] if size else [])
    sampler = open_sampler(args.run, process, parallel, args.online, sample=sample)
    prompts = prompts or of_main(lambda: default_prompts(sampler.config, sampler.condition, args.count))
    of_main(partial(warn_of_size, config, size, decoder.cell))
    prompts = [prompt for prompt in prompts for _ in range(args.repeat)]
    sampler.check(prompts)
    return Job(args.run, sampler, decoder, prompts, args.seed, size, args.batch, process.is_main)


def grid_path(args: argparse.Namespace) -> Path | None:
    """Where a grid is wanted."""
    return args.out or (None if args.folder else args.run / "samples.png")


def fill(folder: PictureFolder, job: Job, overwrite: bool) -> None:
    """Draw what the folder lacks, each rank its share. Collective."""
    there = of_main(lambda: folder.begin(overwrite))
    with job.bar() as bar:
        shares = job.sampler.shares(
            job.prompts,
            job.settings,
            job.seed,
            there=there,
            drawn=lambda pictures: bar.update(len(pictures)),
            **job.how,
        )
        for indices, images in shares:
            missing = [index for index in indices if index not in there]
            with together():  # a disk may be full on one rank
                if job.sampler.writes and missing:
                    own = images[[index - indices.start for index in missing]]
                    folder.write(missing, job.decoder.decode(own))


def draw(job: Job) -> Tensor:
    """All pictures on every rank. Collective."""
    with job.bar() as bar:
        return job.sampler.draw_all(
            job.prompts,
            job.settings,
            job.seed,
            drawn=lambda pictures: bar.update(len(pictures)),
            finish=job.decoder.decode,
            **job.how,
        )


def write_grid(images_of: Callable[[], list[Tensor]], out: Path, columns: int, zoom: int) -> None:
    """Raises ValueError naming the file, if it cannot be written."""
    images = torch.stack(images_of())
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        save_grid(images, out, columns, zoom)


def run(args: argparse.Namespace, process: Process) -> None:
    """Draw, write and say where. Collective; raises ValueError on all ranks."""
    job, out = prepare(args, process), grid_path(args)
    if args.folder:
        folder = PictureFolder(args.folder, job.prompts, job.seed, job.about())
        fill(folder, job, args.overwrite)
        images_of = folder.read
    else:
        images = draw(job)
        images_of = partial(list, images)
    if out:
        of_main(partial(write_grid, images_of, out, args.columns, args.zoom))
    if process.is_main:
        for path in (args.folder, out):
            if path:
                print(path)


def main() -> int:
    args = arguments()
    return run_tool("sample", partial(run, args), options.spoken)


if __name__ == "__main__":
    sys.exit(main())
