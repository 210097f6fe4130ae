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

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megadit.runtime.tool import refuse_early, run_tool
from megadit.sampling import options
from megadit.sampling.config import BRANCHES
from megadit.training.drawn import read_asked

ANIMATIONS = ("gif", "webp", "apng", "none")
BRANCH = """the maps with the prompt, those without it (which guidance steers away from), or by how many experts a patch
has more with it than without (default: %(default)s)"""


def layer_numbers(text: str) -> list[int]:
    """Numbers of layers as 1,3,5, for argparse."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is not of the form 1,3,5: numbers of layers, counted from 0")
    return [int(part) for part in text.split(",")]


def png_or_folder(text: str) -> Path:
    """Where to write, for argparse."""
    path = Path(text)
    if path.suffix == ".png":
        return options.png(text)
    if path.suffix and not text.endswith("/") and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no PNG, nor a folder that is there; end a new folder's name in /")
    return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "prompt", help="what to draw: a caption, or a class's number if the run is conditioned on classes"
    )
    parser.add_argument(
        "--out",
        type=png_or_folder,
        help="a PNG, beside which the rest is written, or a folder; default: the run's folder",
    )
    parser.add_argument("--branch", choices=BRANCHES, default="conditional", help=BRANCH)
    parser.add_argument(
        "--layers", type=layer_numbers, help="such as 1,3: the layers shown; default: all that have experts"
    )
    parser.add_argument(
        "--steps-shown",
        type=options.positive,
        default=5,
        help="columns of the sheet beside the mean (default: %(default)s)",
    )
    parser.add_argument("--plain", action="store_true", help="colours alone, not over the picture")
    parser.add_argument("--animation", choices=ANIMATIONS, default="gif", help="its kind (default: %(default)s)")
    options.add_launcher(parser)
    group = options.add_drawing(parser)
    options.add_size(group)
    options.add_autoencoder(group)
    group.add_argument("--online", action="store_true", help="download encoders that are not on this machine")
    options.add_layout(parser)
    return parser.parse_args()


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("heatmap", partial(read_asked, arguments(), 1), options.spoken)

import torch
from torch import Tensor
from tqdm import tqdm

from megadit.model.config import ECDiTConfig
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.agreement import of_main, together
from megadit.runtime.launch import Process
from megadit.sampling.config import Branch, SampleConfig
from megadit.sampling.evenness import Row, printed, table, write_csv, write_json
from megadit.sampling.folder import writing
from megadit.sampling.heatmap import ALPHA, Scene, decoded, save_animation, sheet, spread_steps
from megadit.sampling.routing import Trace, check_branch, check_experts, recorded
from megadit.training.config import sampling_of
from megadit.training.decoder import Decoder, open_decoder
from megadit.training.restore import Sampler, open_sampler
from megadit.training.trained_sizes import warn_of_size


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


def draw(sampler: Sampler, prompt: str, seed: int, size: tuple[int, int] | None, quiet: bool) -> Drawing:
    """Draw one picture and record it. Collective over the model's ranks."""
    with recorded(sampler.pipeline) as recording:
        bar = partial(tqdm, desc="drawing", unit="step", dynamic_ncols=True, disable=quiet)
        progress = recording.steps(bar)
        image_CHW = sampler.draw([prompt], sampler.config.sample, seed, progress=progress, size=size)[0]
    trace = recording.trace(images=sampler.group)
    began_SCHW = trace.x_NBCHW[trace.firsts, 0]
    return Drawing(trace, torch.cat([began_SCHW, image_CHW[None].to(began_SCHW.device, began_SCHW.dtype)]))


def check_layers(config: ECDiTConfig, wanted: list[int] | None) -> None:
    """Raises ValueError for a model without experts, and for a layer without them."""
    check_experts(config)
    layers = [layer for layer in range(config.layers) if config.is_moe(layer)]
    for layer in wanted or []:
        if layer not in layers:
            known = ", ".join(map(str, layers))
            raise ValueError(f"--layers {layer}: that layer has no experts; those of this run have: {known}")


def chosen_layers(trace: Trace, wanted: list[int] | None) -> list[int]:
    """Places in trace.layers of the wanted ones, None: all."""
    return [i for i, layer in enumerate(trace.layers) if not wanted or layer in wanted]


def counted(branch: Branch) -> Branch:
    """The branch whose numbers go into the table: a difference has none of its own."""
    return "unconditional" if branch == "unconditional" else "conditional"


def rows_of(trace: Trace, places: list[int], branch: Branch) -> list[Row]:
    """The table of some layers."""
    layers = [trace.layers[i] for i in places]
    difference_SLT = trace.maps("difference")[:, places] if trace.is_guided else None
    return table(trace.maps(counted(branch))[:, places], layers, difference_SLT)


def write(drawing: Drawing, decoder: Decoder, args: argparse.Namespace, settings: SampleConfig, files: Files) -> None:
    """All files, and the table on stdout. Raises ValueError naming a file that cannot be written."""
    places = chosen_layers(drawing.trace, args.layers)
    rows = rows_of(drawing.trace, places, args.branch)
    with writing(files.sheet):
        write_figures(scene_of(drawing, places, decoder, args, settings), rows, args.steps_shown, files)
        write_numbers(drawing.trace, places, rows, args, settings, files)
    print(printed(rows))
    for path in files:
        if path is not None:
            print(path)


def scene_of(
    drawing: Drawing, places: list[int], decoder: Decoder, args: argparse.Namespace, settings: SampleConfig
) -> Scene:
    """What the figures show, decoded."""
    trace, frames_SCHW = drawing.trace, drawing.frames_SCHW
    bar = partial(tqdm, desc="decoding", unit="picture", dynamic_ncols=True, total=len(frames_SCHW))
    how = f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}, seed {args.seed}"
    return Scene(
        maps_SLT=trace.maps(args.branch)[:, places],
        layers=[trace.layers[i] for i in places],
        times=[trace.times[i] for i in trace.firsts],
        grid=trace.grid,
        experts=trace.experts,
        branch=args.branch,
        frames=decoded(frames_SCHW, decoder.decode, bar),
        title=f"“{args.prompt}”",
        about=f"{args.run.name}: {how}; {args.branch} branch",
        alpha=1.0 if args.plain else ALPHA,
    )


def write_figures(scene: Scene, rows: list[Row], columns: int, files: Files) -> None:
    """The sheet, with so many steps, and the animation."""
    notes = {row.layer: f"up to {row.evenness.most:.0f} of {scene.experts}\ncv {row.evenness.cv:.2f}" for row in rows}
    shown = spread_steps(len(scene.times), columns)
    sheet(scene, shown, [notes[layer] for layer in scene.layers])[0].save(files.sheet)
    if files.animation is not None:
        bar = partial(tqdm, desc="animation", unit="frame", dynamic_ncols=True, total=len(scene.frames))
        save_animation(scene, files.animation, bar)


def write_numbers(
    trace: Trace, places: list[int], rows: list[Row], args: argparse.Namespace, settings: SampleConfig, files: Files
) -> None:
    """The table, and the maps of every step."""
    about: dict[str, Any] = {"prompt": args.prompt, "seed": args.seed, "branch": args.branch, "sample": vars(settings)}
    about |= {"experts": trace.experts, "grid": trace.grid}
    write_csv(rows, files.csv)
    layers, times = [trace.layers[i] for i in places], [trace.times[i] for i in trace.firsts]
    write_json(rows, trace.maps(counted(args.branch))[:, places], layers, times, about, files.json)


def run(args: argparse.Namespace, process: Process) -> None:
    """Everything. Collective over the world; rank 0 writes. Raises ValueError, on all ranks, for what the user can
    change.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib: pip install -e '.[plots]'")
    files = Files.of(args.out or args.run, args.animation)
    parallel, sample = options.asked(args, ParallelConfig()), options.given(args, SampleConfig)
    sampler = open_sampler(args.run, process, parallel, args.online, sample=sample)
    config = sampler.config
    check_layers(config.model, args.layers)
    with together():
        decoder = open_decoder(config, args.autoencoder, process.device, args.online)
        size = decoder.latent_size(args.size, config.model.patch)
    sampler.check([args.prompt])
    square = (config.model.image_size, config.model.image_size)
    check_branch(args.branch, sampling_of(config, config.sample, size or square))
    of_main(partial(warn_of_size, config, size, decoder.cell))
    of_main(files.prepare)
    drawing = draw(sampler, args.prompt, args.seed, size, quiet=not process.is_main)
    of_main(partial(write, drawing, decoder, args, config.sample, files))


def main() -> int:
    args = arguments()
    return run_tool("heatmap", partial(run, args), options.spoken)


if __name__ == "__main__":
    sys.exit(main())
