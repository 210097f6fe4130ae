"""How good a run is: benchmarks' folders of pictures, distances between sets of images, and the held-out loss.

    python tools/evaluate.py heldout runs/digits
    python tools/evaluate.py geneval runs/large --prompts evaluation_metadata.jsonl --out drawn/geneval
    python tools/evaluate.py check-geneval drawn/geneval --prompts evaluation_metadata.jsonl
    python tools/evaluate.py summary results.jsonl
    python tools/evaluate.py fid photographs drawn --features models/dinov2-base

What draws or computes runs on every process that is started, in any layout; the numbers are those of one process:

    torchrun --standalone --nproc-per-node 4 tools/evaluate.py heldout runs/digits --tensor 2 --expert 2
    srun --ntasks 16 --gpus-per-task 1 python tools/evaluate.py fid runs/large --features models/dinov2-base

Weights of what judges (CLIP, DINOv2, Inception) come from this machine; nothing is downloaded. Each command says more
with --help. exit statuses: 0 done; 1 check-geneval found faults; 2 the input was refused
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megadit.evaluation import geneval
from megadit.evaluation.defaults import BATCH, BINS, SUBSET_SIZE, SUBSETS
from megadit.runtime.tool import refuse_early, run_tool
from megadit.sampling import options
from megadit.training.config import CONFIG_FILE
from megadit.training.drawn import PICTURES_PER_CALL, read_asked

HELP = {
    "geneval": """Draw GenEval's folder (arXiv 2310.11513) from its prompt file: 00000/metadata.jsonl is the file's
first line, 00000/samples/0000.png and so on are its pictures, grid.png shows them together. The same command goes on
after a kill, and refuses a folder of other settings. Send the folder to GenEval's evaluate_images.py; `summary` reads
what that wrote.""",
    "dpg": """Draw DPG-Bench's folder (arXiv 2403.05135): of each file name.txt in the folder of prompts, name.png with
four pictures, 2 x 2, without a gap. Its scorer is told the side of one picture (--resolution). The same command goes on
after a kill, and refuses a folder of other settings.""",
    "check-geneval": """Is a folder what GenEval's scorer expects? The scorer passes over what it does not recognise:
run this before sending a folder anywhere. Prints a line for each fault; status 1 if there is one.""",
    "summary": """Scores of the results.jsonl that GenEval's evaluate_images.py wrote: of each task the fraction of
correct pictures, and overall the unweighted mean of the six tasks.""",
    "fid": """Frechet distance between two sets of images (arXiv 1706.08500), in the features of a network on this
machine. Of two folders of images, the real ones first; or of a run: its data set's held-out images against pictures of
their captions or classes, or of --prompts, which an encoded data set needs whose captions encoders read. Only numbers
with the same features and the same count of images can be compared: the distance is biased upwards by few images.
Published FIDs are of Inception-v3's features and mostly of 50,000 or 30,000 images.""",
    "kid": """Kernel distance between two sets of images (arXiv 1801.01401): unbiased, so also for few images. Sets and
features as of fid.""",
    "clip-score": """100 times the mean cosine between pictures and their captions, in a CLIP on this machine
(arXiv 2104.08718). Of a folder: name.png with its caption in name.txt, or GenEval's folder; or of a run: pictures of
the held-out captions, or of --prompts.""",
    "heldout": """Mean loss of the held-out images by time: in which part of the way from noise to image the network is
good. Noise and times are the same at every call, for every run and every layout, so numbers of two runs on one data set
can be compared.""",
}
HELDOUT = """held-out images that a data-parallel replica takes at a time, rounded up to whole groups of those that are
routed together"""
PLACE = "a folder of images, or a run's folder"


# --- the command line -------------------------------------------------------------------------------------------------


def add_painting(parser: argparse.ArgumentParser) -> None:
    """Options of commands that draw; see `open_painter`."""
    group = options.add_drawing(parser)
    options.add_size(group)
    options.add_autoencoder(group)
    options.add_batch(options.add_layout(parser), PICTURES_PER_CALL)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_launcher(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, alone: bool = False) -> argparse.ArgumentParser:
        first, _, _ = HELP[name].replace("\n", " ").partition(". ")
        one = commands.add_parser(name, help=first.partition(":")[0], description=HELP[name])
        one.set_defaults(alone=alone)
        if not alone:
            one.add_argument("--json", type=Path, help="where the result goes; default: beside what was judged")
        return one

    one = command("geneval")
    one.add_argument("run", type=Path, help="a run's folder; it must read text")
    one.add_argument("--prompts", type=Path, required=True, help="GenEval's evaluation_metadata.jsonl")
    one.add_argument("--out", type=Path, required=True, help="the folder to draw into")
    one.add_argument(
        "--samples", type=options.positive, default=geneval.SAMPLES, help="of each prompt (default: %(default)s)"
    )
    add_painting(one)

    one = command("dpg")
    one.add_argument("run", type=Path, help="a run's folder; it must read text")
    one.add_argument("--prompts", type=Path, required=True, help="DPG-Bench's folder of files name.txt")
    one.add_argument("--out", type=Path, required=True, help="the folder to draw into")
    add_painting(one)

    one = command("check-geneval", alone=True)
    one.add_argument("folder", type=Path, help="the folder to check")
    one.add_argument("--prompts", type=Path, help="the file that it was drawn from: its lines are compared")
    one.add_argument(
        "--samples", type=options.positive, default=geneval.SAMPLES, help="of each prompt (default: %(default)s)"
    )

    one = command("summary", alone=True)
    one.add_argument("results", type=Path, help="the scorer's results.jsonl")
    one.add_argument("--json", type=Path, help="where the scores go, too; default: they are printed alone")

    for name in ("fid", "kid"):
        one = command(name)
        one.add_argument("sets", type=Path, nargs="+", metavar="FOLDER", help="real images and drawn ones; or a run")
        one.add_argument(
            "--features",
            type=Path,
            required=True,
            help="folder of a CLIP or DINOv2 model; or the file of torch-fidelity's Inception-v3",
        )
        one.add_argument(
            "--samples", type=options.positive, help="of a run: pictures to draw; default: as many as held out"
        )
        one.add_argument(
            "--prompts", type=Path, help="of a run: captions, one a line, - is stdin; default: the held-out ones"
        )
        add_painting(one)
    one.add_argument("--subsets", type=options.positive, default=SUBSETS, help="of kid (default: %(default)s)")
    one.add_argument(
        "--subset-size", type=options.several, default=SUBSET_SIZE, help="images (default: %(default)s, if there)"
    )

    one = command("clip-score")
    one.add_argument("place", type=Path, metavar="FOLDER", help=PLACE)
    one.add_argument("--clip", type=Path, required=True, help="folder of a CLIPModel with its tokenizer")
    one.add_argument(
        "--samples", type=options.positive, help="of a run: pictures to draw; default: as many as held out"
    )
    one.add_argument(
        "--prompts", type=Path, help="of a run: captions, one a line, - is stdin; default: the held-out ones"
    )
    add_painting(one)

    one = command("heldout")
    one.add_argument("run", type=Path, help="a run's folder")
    one.add_argument("--bins", type=options.positive, default=BINS, help="of times (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="of noise and times (default: %(default)s)")
    one.add_argument("--plot", type=options.png, help="a PNG of the losses by time")
    options.add_batch(options.add_layout(one), BATCH, HELDOUT)
    return parser


def is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def check_sets(sets: Sequence[Path]) -> None:
    """Raises ValueError unless these are two folders of images, or a run."""
    if len(sets) > 2:
        raise ValueError(f"{len(sets)} folders; give the real images and the drawn ones, or one run")
    runs = [folder for folder in sets if is_run(folder)]
    if len(sets) == 1 and not runs:
        raise ValueError(f"{sets[0]} is no run ({CONFIG_FILE} is not there); of images, give two folders")
    if len(sets) == 2 and runs:
        raise ValueError(
            f"{runs[0]} is a run, not a set of pictures: give it alone to judge what it draws, or a folder of pictures "
            "such as tools/sample.py --folder writes"
        )


def check_opens(folder: Path) -> None:
    """Raises ValueError for a folder that cannot be read."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from error


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for what can be refused before torch is imported."""
    if args.command == "summary":
        geneval.read_scores(args.results)
    elif args.command in ("fid", "kid"):
        check_sets(args.sets)
        for folder in args.sets:
            check_opens(folder)
    elif args.command in ("clip-score", "check-geneval"):
        check_opens(args.place if args.command == "clip-score" else args.folder)
    else:
        read_asked(args, 1)


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("evaluate", partial(check_arguments, make_parser().parse_args()), options.spoken)

import torch
from tqdm import tqdm

from megadit.evaluation import captioned, drawing, heldout
from megadit.evaluation.clip_score import ClipScore, mean_score
from megadit.evaluation.distances import frechet, kernel, too_few
from megadit.evaluation.features import Extractor, open_extractor
from megadit.evaluation.geneval_check import check_folder
from megadit.evaluation.heldout_split import heldout_prompts, open_share
from megadit.evaluation.images import images_in
from megadit.evaluation.painter import Painter
from megadit.evaluation.results import beside, check_judges, versions, write_json
from megadit.evaluation.sets import add_all, drawn_features, file_features, heldout_features, of_drawn, of_files
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.agreement import gathered, of_main, together
from megadit.runtime.launch import Process
from megadit.sampling.config import SampleConfig
from megadit.sampling.folder import check_writable
from megadit.sampling.prompts import read_prompts
from megadit.training.decoder import open_decoder
from megadit.training.restore import open_sampler
from megadit.training.trained_sizes import warn_of_size

Answer = tuple[dict[str, Any], list[str], Path]  # the result, what to print of it, and the JSON to write


# --- commands ---------------------------------------------------------------------------------------------------------


def open_painter(args: argparse.Namespace, process: Process) -> Painter:
    """The run that draws. Collective. Raises ValueError for a run, an autoencoder or a size that will not do."""
    parallel, sample = options.asked(args, ParallelConfig()), options.given(args, SampleConfig)
    sampler = open_sampler(args.run, process, parallel, sample=sample)
    with together():
        decoder = open_decoder(sampler.config, args.autoencoder, process.device)
        painter = Painter(args.run, sampler, decoder, sampler.config.sample, args.seed, args.size, args.batch)
        painter.check_shows()
    of_main(partial(warn_of_size, sampler.config, painter.latent_size, decoder.cell))
    return painter


def run_geneval(args: argparse.Namespace, process: Process) -> Answer:
    of_main(partial(drawing.check_out, args.out))
    painter = open_painter(args, process)
    result = drawing.draw_geneval(painter, args.prompts, args.out, args.samples)
    return result, [result["line"]], args.json or drawing.settings_path(args.out)


def run_dpg(args: argparse.Namespace, process: Process) -> Answer:
    of_main(partial(drawing.check_out, args.out))
    result = drawing.draw_dpg(open_painter(args, process), args.prompts, args.out)
    return result, [result["line"]], args.json or drawing.settings_path(args.out)


def run_heldout(args: argparse.Namespace, process: Process) -> Answer:
    if args.plot:
        of_main(heldout.check_plots)
        of_main(partial(check_writable, args.plot))
    sampler = open_sampler(args.run, process, options.asked(args, ParallelConfig()), reads_prompts=False)
    with together():
        share = open_share(args.run, sampler, args.batch)
    bar = partial(tqdm, desc="passes over the held-out images", dynamic_ncols=True, disable=not process.is_main)
    losses = heldout.losses_by_bin(sampler, share, args.bins, args.seed, bar)
    heldout.check_finite(losses, f"{args.run}, step {sampler.step}")
    bins = heldout.summarise(losses, sampler.config.objective)
    settings = {"run": str(args.run), "step": sampler.step, "seed": args.seed, "dtype": sampler.config.run.dtype}
    lines, path = heldout.table(bins), args.json or args.run / "heldout.json"
    numbers = {**heldout.to_dict(bins), "images": share.total}
    result = {"settings": settings, **numbers, "versions": versions(), "line": lines[-1]}
    if args.plot:
        title = f"{args.run.name}, step {sampler.step}"
        of_main(lambda: write_json(path, result))  # the numbers are kept, whatever becomes of the plot
        of_main(lambda: heldout.save_plot(bins, args.plot, title))
        lines.insert(-1, str(args.plot))
    return result, lines, path


def prompts_of(args: argparse.Namespace, painter: Painter) -> list[str]:
    """What a run draws: the lines of --prompts in turn, else what the held-out images are told."""
    if args.prompts:
        lines = read_prompts(str(args.prompts))
        return [lines[i % len(lines)] for i in range(args.samples or len(lines))]
    return heldout_prompts(args.run, painter.sampler.condition, args.samples)


def two_sets(
    args: argparse.Namespace, process: Process
) -> tuple[dict[str, Any], Extractor, torch.Tensor, torch.Tensor]:
    """(what was compared, in what features, those of the real images, of the drawn ones), the last two on rank 0."""
    of_main(partial(check_sets, args.sets))
    with together():
        check_judges()
        extractor = open_extractor(args.features, process.device)
    if len(args.sets) == 2:
        real, drawn = (of_main(partial(images_in, folder)) for folder in args.sets)
        found = [file_features(paths, extractor, process) for paths in (real, drawn)]
        return {"real": str(args.sets[0]), "drawn": str(args.sets[1])}, extractor, found[0], found[1]
    args.run = args.sets[0]
    painter = open_painter(args, process)
    with together():
        share = open_share(args.run, painter.sampler)
    prompts = of_main(lambda: prompts_of(args, painter))
    decoded = f", decoded by {painter.decoder.name}" if painter.decoder.name else ""
    settings = {"real": f"held-out images of {args.run}{decoded}", "drawn": painter.identity()}
    real_features = heldout_features(share, painter, extractor)
    return settings, extractor, real_features, drawn_features(painter, prompts, extractor)


def compared(
    args: argparse.Namespace, process: Process, name: str, measure: Callable[..., tuple[dict[str, Any], str]]
) -> Answer:
    """A distance between two sets; measure(real, drawn) on rank 0 gives (the numbers, how to say them)."""
    settings, extractor, real, drawn = two_sets(args, process)
    counts = f"{len(real)} real and {len(drawn)} drawn images, {extractor.identity['class']}"

    def result() -> tuple[dict[str, Any], list[str]]:
        numbers, told = measure(real, drawn)
        warnings = too_few(len(real), len(drawn), extractor.width) if name == "fid" else []
        line = f"{told} ({counts}, {extractor.width} features)"
        found = {
            **numbers,
            "real_images": len(real),
            "drawn_images": len(drawn),
            "features": {**extractor.identity, "width": extractor.width},
            "settings": settings,
            "warnings": warnings,
            "versions": versions(),
            "line": line,
        }
        return found, [*(f"warning: {warning}" for warning in warnings), line]

    found, lines = of_main(result)
    last = args.sets[-1]
    path = last / f"{name}.json" if len(args.sets) == 1 else beside(last, f"{name}.json")  # of a run, or of two sets
    return found, lines, args.json or path


def run_fid(args: argparse.Namespace, process: Process) -> Answer:
    def measure(real: torch.Tensor, drawn: torch.Tensor) -> tuple[dict[str, Any], str]:
        distance = frechet(real, drawn)
        return {"fid": distance}, f"FID {distance:.4f}"

    return compared(args, process, "fid", measure)


def run_kid(args: argparse.Namespace, process: Process) -> Answer:
    def measure(real: torch.Tensor, drawn: torch.Tensor) -> tuple[dict[str, Any], str]:
        found = kernel(real, drawn, args.seed, args.subsets, args.subset_size)
        told = f"KID {found.mean:.6f} +- {found.std:.6f} over {found.subsets} subsets of {found.subset_size}"
        numbers = {"kid": found.mean, "kid_std": found.std, "subsets": found.subsets, "subset_size": found.subset_size}
        return numbers, told

    return compared(args, process, "kid", measure)


def run_clip_score(args: argparse.Namespace, process: Process) -> Answer:
    with together():
        check_judges()
        score = ClipScore(args.clip, process.device)
    if of_main(lambda: is_run(args.place)):
        args.run = args.place
        painter = open_painter(args, process)
        with together():
            painter.check_reads_text("a CLIP score")
        captions = of_main(lambda: prompts_of(args, painter))
        add_all(of_drawn(painter, captions), captions, score)
        settings: dict[str, Any] = {"drawn": painter.identity()}
        path = args.place / "clip_score.json"
    else:
        pairs = of_main(lambda: captioned.pairs_in(args.place))
        captions = [pair.caption for pair in pairs]
        with together():
            add_all(of_files([pair.picture for pair in pairs], process), captions, score)
        settings, path = {"drawn": str(args.place)}, beside(args.place, "clip_score.json")
    mean, cut = mean_score(gathered(score.sums())), score.too_long(captions)
    line = f"CLIP score {mean:.4f} ({len(captions)} pictures, {score.identity['name']}; {cut} captions cut)"
    numbers = {"clip_score": mean, "images": len(captions), "captions_cut": cut, "clip": score.identity}
    return {**numbers, "settings": settings, "versions": versions(), "line": line}, [line], args.json or path


def run_check(args: argparse.Namespace) -> int:
    prompts = geneval.read_prompts(args.prompts) if args.prompts else None
    faults = check_folder(args.folder, prompts, args.samples)
    for fault in faults:
        print(fault)
    if not faults:
        found = prompts or [geneval.read_metadata(path) for path in sorted(args.folder.iterdir()) if path.is_dir()]
        print(f"{args.folder}: as GenEval's scorer expects it: {geneval.tally(found)}, {args.samples} pictures each")
    return 1 if faults else 0


def run_summary(args: argparse.Namespace) -> int:
    scores = geneval.read_scores(args.results)
    print("\n".join(scores.lines()))
    if args.json:
        write_json(args.json, {"results": str(args.results), **scores.to_dict(), "line": scores.lines()[-1]})
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {
    "geneval": run_geneval,
    "dpg": run_dpg,
    "check-geneval": run_check,
    "summary": run_summary,
    "fid": run_fid,
    "kid": run_kid,
    "clip-score": run_clip_score,
    "heldout": run_heldout,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if not args.alone:
        return run_tool("evaluate", partial(judge, args), options.spoken)
    try:
        return int(COMMANDS[args.command](args))
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def judge(args: argparse.Namespace, process: Process) -> None:
    """Do what is asked; rank 0 writes and prints. Collective; raises ValueError on all ranks."""
    if args.json:
        of_main(partial(check_writable, args.json))
    result, lines, path = COMMANDS[args.command](args, process)
    of_main(lambda: write_json(path, result))
    if process.is_main:
        print("\n".join([*lines[:-1], str(path), lines[-1]]))


if __name__ == "__main__":
    sys.exit(main())
