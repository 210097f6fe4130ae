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

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from tqdm import tqdm

from megadit.data.loader import open_dataset
from megadit.data.stored import numbers
from megadit.encoders.condition import Condition
from megadit.parallel.grid import ParallelConfig
from megadit.runtime.agreement import gathered, of_main, together
from megadit.runtime.launch import LaunchError, Process, process_group
from megadit.runtime.log import setup_logging
from megadit.sampling.folder import PictureFolder, check_writable, writing
from megadit.sampling.generate import SampleConfig
from megadit.sampling.picture import save_grid
from megadit.sampling.prompts import read_prompts
from megadit.training.config import CONFIG_FILE, RunConfig, check, check_sizes, load_config
from megadit.training.encoded import Named, autoencoder_of
from megadit.training.restore import PICTURES_PER_CALL, Sampler, as_drawn, open_sampler
from megadit.training.trained_sizes import untrained_size

logger = logging.getLogger("megadit")

PROMPTS = """what to draw: captions, or numbers of classes if the run is conditioned on classes;
default: the data set's held-out ones"""


def spoken(message: str) -> str:
    """A message about a run's configuration, in the words of this tool's options.

    >>> spoken("parallel.tensor=3 does not divide model.heads=4; use 1, 2 or 4")
    '--tensor 3 does not divide model.heads=4; use 1, 2 or 4'
    >>> spoken("parallel.tensor=2 x pipeline=1 x expert=2 = 4 does not divide the 3 processes that were started")
    '--tensor 2 x --pipeline 1 x --expert 2 = 4 does not divide the 3 processes that were started'
    >>> spoken("which parallel.tensor=2 does not divide; use parallel.sequence=false, or another size")
    'which --tensor 2 does not divide; use no --sequence, or another size'
    """

    def option(match: re.Match[str]) -> str:
        name = "--" + match["name"].replace("_", "-")
        return f"{name} " if match["equals"] else name

    message = message.replace("parallel.sequence=false", "no --sequence")
    message = re.sub(r"(?<= x )(?P<name>pipeline|expert)(?P<equals>=)", option, message)
    return re.sub(r"\b(?:parallel|sample)\.(?P<name>\w+)(?P<equals>=?)", option, message)


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


def choices(kind: type, name: str) -> tuple[str, ...]:
    """What a field of a configuration can be."""
    return get_args(get_type_hints(kind)[name])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("prompts", nargs="*", help=PROMPTS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's

    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--prompts", dest="prompts_file", metavar="FILE", help="a prompt a line, - is stdin; empty lines are skipped"
    )
    what.add_argument(
        "--count", type=positive, default=40, help="pictures when no prompt is given (default: %(default)s)"
    )
    what.add_argument("--repeat", type=positive, default=1, help="pictures of each prompt (default: %(default)s)")
    what.add_argument(
        "--seed", type=int, default=0, help="of the noise: a picture's is that of seed and index (default: %(default)s)"
    )
    what.add_argument("--size", type=height_width, metavar="HxW", help="in pixels; default: the model's square")

    # Options of the names of SampleConfig's fields: `settings_of` finds them.
    how = parser.add_argument_group("how to draw it")
    how.add_argument("--steps", type=positive, help="sampling steps; default: the run's sample.steps")
    how.add_argument("--guidance", type=float, help="guidance scale, 1 is none; default: the run's sample.guidance")
    how.add_argument("--sampler", choices=choices(SampleConfig, "sampler"), help="default: the run's sample.sampler")

    where = parser.add_argument_group("where it is written")
    where.add_argument("--out", type=Path, help="the grid, a PNG; default: samples.png in the run's folder")
    where.add_argument("--columns", type=positive, default=10, help="of the grid (default: %(default)s)")
    where.add_argument("--zoom", type=positive, default=6, help="width of a pixel of the grid (default: %(default)s)")
    where.add_argument(
        "--folder",
        type=Path,
        help="a PNG for each picture, 00000.png and so on, and prompts.jsonl that says what they are; what is there "
        "already is not drawn again; no grid then, unless --out asks for it too",
    )
    where.add_argument("--overwrite", action="store_true", help="draw all of --folder again, whatever is there")

    # Options of the names of ParallelConfig's fields: `parallel_of` finds them.
    layout = parser.add_argument_group("on how many processes; they are tensor x pipeline x expert x data")
    layout.add_argument("--tensor", type=positive, help="ranks that a layer's heads are cut over (default: 1)")
    layout.add_argument("--sequence", action="store_true", default=None, help="cut tokens over them, too")
    layout.add_argument("--pipeline", type=positive, help="ranks that the layers are cut over (default: 1)")
    layout.add_argument("--schedule", choices=choices(ParallelConfig, "schedule"), help="of a pipeline (default: 1f1b)")
    layout.add_argument(
        "--stages-per-rank",
        type=positive,
        help="slices of the layers on a rank, if interleaved (default: 2)",
    )
    layout.add_argument("--expert", type=positive, help="ranks that the experts are cut over (default: 1)")
    layout.add_argument(
        "--batch",
        type=positive,
        default=PICTURES_PER_CALL,
        help="pictures that a data-parallel replica draws at a time, whole groups of those that are routed together; "
        "guidance doubles what the network sees (default: %(default)s)",
    )

    encoders = parser.add_argument_group("encoders")
    encoders.add_argument("--autoencoder", help="that decodes, by name or folder; default: that of the run's data")
    encoders.add_argument("--online", action="store_true", help="download encoders that are not on this machine")
    args = parser.parse_intermixed_args()
    if args.prompts and args.prompts_file:
        parser.error("prompts are given twice, as arguments and as --prompts; give them once")
    if args.overwrite and not args.folder:
        parser.error("--overwrite is for --folder; a grid is always written anew")
    return args


Options = TypeVar("Options", SampleConfig, ParallelConfig)


def asked(args: argparse.Namespace, default: Options) -> Options:
    """A configuration with each field as the option of its name says, where that is given."""
    given = {field.name: getattr(args, field.name, None) for field in fields(default)}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def default_prompts(config: RunConfig, condition: Condition, count: int) -> list[str]:
    """Held-out captions or classes. Raises ValueError where the data has only what encoders made of its captions."""
    if config.data.kind != "shards":
        return open_dataset(config.data, "heldout", config.model.conditioning).prompts(count)
    return numbers(condition, count)


class Decoder(NamedTuple):
    """What makes pixels of latents. cell: pixels along one side of a latent's cell. name: the autoencoder's."""

    decode: Callable[[Tensor], Tensor]
    cell: int
    name: str

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
        return Decoder(lambda images_BCHW: images_BCHW, 1, "")
    from megadit.encoders.autoencoder import Autoencoder

    autoencoder = Autoencoder.load(named.name, device, torch.float32, named.revision, online)
    return Decoder(
        lambda latents_BCHW: torch.cat([autoencoder.decode(each) for each in latents_BCHW.split(1)]),
        autoencoder.downscale,
        named.name,
    )


def named_autoencoder(config: RunConfig, asked_for: str | None) -> Named | None:
    """The one that is asked for, else the run's; None where latents are pixels. Raises ValueError if nothing says which
    that is.
    """
    if asked_for:
        return Named(asked_for, "")
    try:
        return autoencoder_of(config)
    except ValueError as error:
        raise ValueError(f"{error}; without it, name what decodes pictures with --autoencoder") from error


@dataclass(frozen=True)
class Job:
    """Everything that is known before a picture is drawn, the same on every rank."""

    sampler: Sampler
    decoder: Decoder
    settings: SampleConfig
    prompts: list[str]
    seed: int
    size: tuple[int, int] | None  # in latent cells
    batch: int
    is_main: bool

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
            "step": self.sampler.step,
            "height": size[0] * self.decoder.cell,
            "width": size[1] * self.decoder.cell,
            "autoencoder": self.decoder.name,
            **asdict(self.settings),
        }


def prepare(args: argparse.Namespace, process: Process) -> Job:
    """Read and check everything. Collective; raises ValueError on all ranks, for a layout before anything is loaded."""
    parallel = asked(args, ParallelConfig())
    with together():
        trained = load_config(args.run / CONFIG_FILE)
        settings = asked(args, trained.sample)
        config = as_drawn(replace(trained, sample=settings), process.world_size, parallel)
        check(config, process.world_size)
    prompts = of_main(lambda: read_prompts(args.prompts_file) if args.prompts_file else args.prompts)
    for path in (args.folder, grid_path(args)):
        if path:
            of_main(partial(check_writable, path))
    with together():
        decoder = open_decoder(named_autoencoder(config, args.autoencoder), process.device, args.online)
        size = decoder.latent_size(args.size, config.model.patch)
        check_sizes(config, [size] if size else [])
    sampler = open_sampler(args.run, process, parallel, args.online)
    prompts = prompts or of_main(lambda: default_prompts(sampler.config, sampler.condition, args.count))
    warning = of_main(lambda: untrained_size(config, size, decoder.cell))
    if warning:
        logger.warning("%s", warning)
    prompts = [prompt for prompt in prompts for _ in range(args.repeat)]
    sampler.check(prompts)
    return Job(sampler, decoder, settings, prompts, args.seed, size, args.batch, process.is_main)


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
    try:
        with process_group() as process:
            setup_logging(process.rank)
            try:
                run(args, process)
            except ValueError as error:
                if process.is_main:
                    print(f"sample: {spoken(str(error))}", file=sys.stderr, flush=True)
                gathered(None)  # launchers end everyone when the first process exits, so exit after the message
                return 2
    except LaunchError as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
