"""Which patches the experts pick: heat maps over a picture, layer by layer and step by step.

    python tools/heatmap.py runs/digits "a handwritten seven" --out seven.png
    python tools/heatmap.py runs/digits "a handwritten seven" --branch difference --out difference/
    python tools/heatmap.py runs/photographs "a tabby cat" --layers 15,27 --steps-shown 8 --size 512x512
    torchrun --standalone --nproc-per-node 4 tools/heatmap.py runs/large "a tabby cat" --pipeline 2 --expert 2

Draws one picture as tools/sample.py does, the same on any number of processes, and writes beside one another: a sheet
(.png: a row for each layer with experts, a column for some steps and for the mean over all), an animation over the
steps (.gif), and how evenly the layers spread their experts, the most uneven first (.csv, and with the map of every
step .json), which is also printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from tqdm import tqdm

from megadit.parallel.grid import ParallelConfig
from megadit.runtime.agreement import of_main
from megadit.runtime.launch import Process, process_group
from megadit.runtime.log import setup_logging
from megadit.sampling.evenness import Row, printed, table, write_csv, write_json
from megadit.sampling.generate import SampleConfig
from megadit.sampling.heatmap import ALPHA, Scene, decoded, save_animation, sheet, spread_steps
from megadit.sampling.routing import BRANCHES, Branch, Trace, check_experts, recorded
from megadit.training.encoded import Named, autoencoder_of
from megadit.training.restore import Sampler, open_sampler

ANIMATIONS = ("gif", "webp", "apng", "none")
SAMPLERS = get_args(get_type_hints(SampleConfig)["sampler"])


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


def numbers(text: str) -> list[int]:
    """Numbers of layers as 1,3,5, for argparse."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is not of the form 1,3,5: numbers of layers, counted from 0")
    return [int(part) for part in text.split(",")]


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
    from megadit.encoders.autoencoder import Autoencoder  # seconds

    autoencoder = Autoencoder.load(named.name, device, torch.float32, named.revision, online)
    return Decoder(lambda latents_BCHW: autoencoder.decode(latents_BCHW.to(device)), autoencoder.downscale)


class Files(NamedTuple):
    """What is written."""

    sheet: Path
    animation: Path | None
    csv: Path
    json: Path

    @classmethod
    def of(cls, out: Path, kind: str) -> Files:
        """Beside a named PNG under its stem, or in a folder."""
        stem = out.with_suffix("") if out.suffix == ".png" else out / "heatmap"
        png, csv, json = (stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "csv", "json"))
        return cls(png, None if kind == "none" else stem.with_name(f"{stem.name}.{kind}"), csv, json)

    def prepare(self) -> None:
        """Make their folder. Raises ValueError where that, or writing into it, is not possible."""
        folder = self.sheet.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"--out: {folder}: {error.strerror}") from error


class Drawing(NamedTuple):
    """A picture and its routing, on the host. frames_SCHW: what each step began from, then the result; latents."""

    trace: Trace
    frames_SCHW: Tensor


def draw(
    sampler: Sampler, prompt: str, settings: SampleConfig, seed: int, size: tuple[int, int] | None, quiet: bool
) -> Drawing:
    """Draw one picture and record it. Collective over the model's ranks."""
    with recorded(sampler.pipeline) as recording:
        bar = partial(tqdm, desc="drawing", unit="step", dynamic_ncols=True, disable=quiet)
        image_CHW = sampler.draw([prompt], settings, seed, progress=recording.steps(bar), size=size)[0]
    trace = recording.trace(images=sampler.group)
    began_SCHW = trace.x_NBCHW[trace.firsts, 0]
    return Drawing(trace, torch.cat([began_SCHW, image_CHW[None].to(began_SCHW.device, began_SCHW.dtype)]))


def chosen_layers(trace: Trace, asked: list[int] | None) -> list[int]:
    """Places in trace.layers. Raises ValueError for a layer without experts."""
    for layer in asked or []:
        if layer not in trace.layers:
            known = ", ".join(map(str, trace.layers))
            raise ValueError(f"--layers {layer}: that layer has no experts; those of this run have: {known}")
    return [i for i, layer in enumerate(trace.layers) if not asked or layer in asked]


def rows_of(trace: Trace, places: list[int], branch: Branch) -> list[Row]:
    """The table of some layers; a difference has none of its own, so that of the conditional branch."""
    layers = [trace.layers[i] for i in places]
    maps_SLT = trace.maps("unconditional" if branch == "unconditional" else "conditional")[:, places]
    return table(maps_SLT, layers, trace.maps("difference")[:, places] if trace.is_guided else None)


def write(drawing: Drawing, decoder: Decoder, args: argparse.Namespace, settings: SampleConfig, files: Files) -> None:
    """All files, and the table on stdout."""
    trace, branch = drawing.trace, args.branch
    places = chosen_layers(trace, args.layers)
    maps_SLT, rows = trace.maps(branch)[:, places], rows_of(trace, places, branch)
    bar = partial(tqdm, dynamic_ncols=True, total=len(drawing.frames_SCHW))
    how = f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}, seed {args.seed}"
    scene = Scene(
        maps_SLT=maps_SLT,
        layers=[trace.layers[i] for i in places],
        times=[trace.times[i] for i in trace.firsts],
        grid=trace.grid,
        experts=trace.experts,
        branch=branch,
        frames=decoded(drawing.frames_SCHW, decoder.decode, partial(bar, desc="decoding", unit="picture")),
        title=f"“{args.prompt}”",
        about=f"{args.run.name}: {how}; {branch} branch",
        alpha=1.0 if args.plain else ALPHA,
    )
    notes = {row.layer: f"up to {row.evenness.most:.0f} of {trace.experts}\ncv {row.evenness.cv:.2f}" for row in rows}
    shown = spread_steps(len(scene.times), args.steps_shown)
    sheet(scene, shown, [notes[layer] for layer in scene.layers])[0].save(files.sheet)
    if files.animation is not None:
        save_animation(scene, files.animation, partial(bar, desc="animation", unit="frame"))
    about: dict[str, Any] = {"prompt": args.prompt, "seed": args.seed, "branch": branch, "sample": vars(settings)}
    about |= {"experts": trace.experts, "grid": trace.grid}
    write_csv(rows, files.csv)
    base = trace.maps("unconditional" if branch == "unconditional" else "conditional")[:, places]
    write_json(rows, base, scene.layers, scene.times, about, files.json)
    print(printed(rows))
    for path in files:
        if path is not None:
            print(path)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "prompt", help="what to draw: a caption, or a class's number if the run is conditioned on classes"
    )
    parser.add_argument(
        "--out", type=Path, help="a PNG, beside which the rest is written, or a folder; default: the run's folder"
    )
    parser.add_argument("--branch", choices=BRANCHES, default="conditional", help=BRANCH)
    parser.add_argument("--layers", type=numbers, help="such as 1,3: the layers shown; default: all that have experts")
    parser.add_argument(
        "--steps-shown", type=positive, default=5, help="columns of the sheet beside the mean (default: %(default)s)"
    )
    parser.add_argument("--plain", action="store_true", help="colours alone, not over the picture")
    parser.add_argument("--animation", choices=ANIMATIONS, default="gif", help="its kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--steps", type=positive, help="sampling steps; default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is none; default: the run's sample.guidance")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the run's sample.sampler")
    parser.add_argument("--size", type=height_width, metavar="HxW", help="in pixels; default: the model's square")
    parser.add_argument("--autoencoder", help="that decodes, by name or folder; default: that of the run's data")
    parser.add_argument("--online", action="store_true", help="download encoders that are not on this machine")
    for name, what in (("tensor", "heads"), ("pipeline", "layers"), ("expert", "experts")):
        told = f"ranks that the {what} are cut over (default: %(default)s)"
        parser.add_argument(f"--{name}", type=positive, default=1, help=told)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_args()


BRANCH = """the maps with the prompt, those without it (which guidance steers away from), or by how many experts a patch
has more with it than without (default: %(default)s)"""


def drawn_and_written(args: argparse.Namespace, process: Process) -> None:
    """Everything. Collective over the world; rank 0 writes. Raises ValueError for what the user can change."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib: pip install -e '.[plots]'")
    files = Files.of(args.out or args.run, args.animation)
    parallel = ParallelConfig(tensor=args.tensor, pipeline=args.pipeline, expert=args.expert)
    sampler = open_sampler(args.run, process, parallel, args.online)
    config = sampler.config
    check_experts(config.model)
    autoencoder = Named(args.autoencoder, "") if args.autoencoder else autoencoder_of(config)
    decoder = open_decoder(autoencoder, process.device, args.online)
    given = {key: getattr(args, key) for key in ("sampler", "steps", "guidance")}
    settings = replace(config.sample, **{key: value for key, value in given.items() if value is not None})
    of_main(files.prepare)
    size = decoder.latent_size(args.size, config.model.patch)
    drawing = draw(sampler, args.prompt, settings, args.seed, size, quiet=not process.is_main)
    chosen_layers(drawing.trace, args.layers)  # a fault that all ranks see
    drawing.trace.maps(args.branch)
    if process.is_main:
        write(drawing, decoder, args, settings, files)


def main() -> int:
    args = parsed()
    with process_group() as process:
        setup_logging(process.rank)
        try:
            drawn_and_written(args, process)
        except ValueError as error:
            if process.is_main:
                print(f"heatmap: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
