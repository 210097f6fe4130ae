"""Look into checkpoints, and turn them into what something else needs, one tensor at a time.

  python tools/convert_checkpoint.py inspect runs/digits --names 'weight.blocks.1.*'
  python tools/convert_checkpoint.py verify  runs/digits
  python tools/convert_checkpoint.py export  runs/digits exports/digits --dtype bfloat16
  python tools/convert_checkpoint.py import  exports/digits runs/imported
  python tools/convert_checkpoint.py upcycle runs/dense runs/moe model.experts=8 model.normalise_gates=true
  python tools/convert_checkpoint.py average runs/a runs/b runs/mean

A SOURCE is the folder of a run (its latest checkpoint is meant), of a checkpoint (step_00000100), of an export, or of a
model of diffusers. Memory does not grow with it: tensors pass one at a time, of a mixture one expert at a time. A
destination appears when it is complete; what is there already stays as it is. Nothing is unpickled.

Exit status: 0; 2 when the input is refused, or verify finds a fault; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from megadit.checkpoint.stream import Progress

REFUSED, INTERRUPTED = 2, 130  # exit statuses
DTYPES = ("float32", "bfloat16", "float16", "float64")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

EXPORT = """\
Write weights as safetensors with a config.json: model.safetensors, or shards with an index.

--tensor N --expert M writes N x M folders, tensor_00_expert_01 and so on, each with what that rank of such a layout
holds of every parameter; whole experts are spread over both.
--format diffusers writes what PixArtTransformer2DModel.from_pretrained or DiTTransformer2DModel.from_pretrained reads,
and says what the network has that they cannot, if it is not one of theirs.
"""
IMPORT = """\
Make a run's folder of an export of ours, or of a model of diffusers (PixArtTransformer2DModel, DiTTransformer2DModel).

Every tensor must have its place and every place its tensor; else one error lists them all, and nothing is written.
The folder has weights alone: sample from it, convert it, or start a run from it with run.init_from=RUN_FOLDER.
"""
UPCYCLE = """\
Turn a dense model into a mixture of experts (sparse upcycling, arXiv 2212.05055): each expert starts as a copy of the
layer that it replaces, the router as in a new model. Optimizer state and averages come along, so that the run goes on:

  python tools/convert_checkpoint.py upcycle runs/dense runs/moe model.experts=8 model.capacity_factor=2
  python -m megadit.train --config runs/moe/config.yaml run.steps=2000

It says whether the new model computes what the dense one did, but for rounding, and if not, why. It does, for instance,
with model.routing=token_choice model.dropless=true model.normalise_gates=true.
"""
AVERAGE = """\
Make a run's folder of the mean of the weights of several checkpoints of one network, summed in float64.
"""
VERIFY = """\
Read every byte of a checkpoint: sizes and sha256 of its files, and that the boxes of the manifest tile every tensor and
lie in their files. Of an export, and of a model of diffusers, whose bytes nobody noted: headers, lengths and index.
Names each file at fault; the exit status is then 2.
"""


def size(text: str) -> int:
    """5GB, 512MiB or plain bytes, for argparse."""
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    try:
        number = float(text.removesuffix(unit)) * UNITS.get(unit, 1)
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 512MiB")
    return int(number)


def degree(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number


class Bar:
    """A progress bar of bytes that begins when the work does; without a terminal it stays silent."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Any = None

    def __call__(self, total: int) -> Progress:
        self.bar = tqdm(
            desc=self.what, total=total, unit="B", unit_scale=True, unit_divisor=1000, dynamic_ncols=True, disable=None
        )
        return self.bar.update

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


# Each imports what it needs: torch takes seconds, and --help should not.


def inspect(args: argparse.Namespace) -> int:
    from megadit.conversion.contents import as_table, contents

    found = contents(args.source, args.names)
    print(json.dumps(found, indent=2) if args.json else as_table(found))
    return 0


def verify(args: argparse.Namespace) -> int:
    from megadit.conversion.verify import verify

    with Bar("verify") as bar:
        findings = verify(args.source, bar)
    for fault in findings.faults:
        print(f"bad: {fault}")
    for note in findings.notes:
        print(f"note: {note}")
    if not findings.faults:
        print(f"good: {findings.path}")
    return REFUSED if findings.faults else 0


def check_bytes(sources: list[Path], skip: bool) -> None:
    """Of checkpoints, before they are converted."""
    from megadit.conversion.verify import check_sources

    if not skip:
        with Bar("check") as bar:
            check_sources(sources, bar)


def export(args: argparse.Namespace) -> int:
    import torch

    from megadit.conversion.export import Export, export_weights

    wanted = Export(
        args.weights,
        None if args.dtype is None else getattr(torch, args.dtype),
        args.format,
        args.tensor or 1,
        args.expert or 1,
        bool(args.tensor or args.expert),
        args.max_shard_size,
        args.overwrite,
    )
    check_bytes([args.source], args.no_verify)
    with Bar("export") as bar:
        done = export_weights(args.source, args.out, wanted, bar)
    print(done)
    return 0


def import_(args: argparse.Namespace) -> int:
    from megadit.conversion.run_folder import import_weights

    with Bar("import") as bar:
        done = import_weights(args.source, args.run, bar, args.drop)
    print(done)
    return 0


def upcycle(args: argparse.Namespace) -> int:
    from megadit.conversion.upcycle import upcycle

    check_bytes([args.source], args.no_verify)
    with Bar("upcycle") as bar:
        done = upcycle(args.source, args.run, args.overrides, args.noise, args.seed, bar)
    print(done.line)
    if done.departures:
        print(f"the model starts elsewhere than the dense one: {'; '.join(done.departures)}")
    else:
        print("the model computes what the dense one did, but for rounding")
    return 0


def average(args: argparse.Namespace) -> int:
    from megadit.conversion.average import average_weights

    *sources, destination = args.folders
    if len(sources) < 2:
        raise ValueError("average needs at least two sources and a folder to make")
    check_bytes(sources, args.no_verify)
    with Bar("average") as bar:
        done = average_weights(sources, destination, args.weights, args.ratios, bar)
    print(done)
    return 0


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        line = text.strip().splitlines()[0]
        added = commands.add_parser(
            name, help=line, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.set_defaults(run_command=run)
        return added

    added = command("inspect", inspect, "List names, shapes and bytes, count parameters, show step and configuration.")
    added.add_argument("source", type=Path, metavar="SOURCE")
    added.add_argument("--json", action="store_true", help="JSON in place of a table")
    added.add_argument("--names", default="*", metavar="GLOB", help="only tensors of such names, as 'ema.blocks.3.*'")

    added = command("verify", verify, VERIFY)
    added.add_argument("source", type=Path, metavar="SOURCE")

    added = command("export", export, EXPORT)
    added.add_argument("source", type=Path, metavar="SOURCE")
    added.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    added.add_argument(
        "--weights",
        choices=("model", "master", "ema"),
        help="of a checkpoint: the parameters, their float32 masters, their average; default: ema, if there is one",
    )
    added.add_argument("--dtype", choices=DTYPES, help="default: as they are")
    added.add_argument("--format", choices=("megadit", "diffusers"), default="megadit", help="default: %(default)s")
    added.add_argument("--tensor", type=degree, metavar="N", help="cut for that many tensor-parallel ranks")
    added.add_argument("--expert", type=degree, metavar="M", help="cut for that many expert-parallel ranks")
    added.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="of a file, unless one tensor is larger (default: %(default)s)",
    )
    added.add_argument("--overwrite", action="store_true", help="an older export of ours at OUT goes")

    added = command("import", import_, IMPORT)
    added.add_argument("source", type=Path, metavar="SOURCE")
    added.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a folder that is not there yet")

    added.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave a tensor of theirs behind; may be repeated"
    )

    added = command("upcycle", upcycle, UPCYCLE)
    added.add_argument("source", type=Path, metavar="SOURCE")
    added.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a folder that is not there yet")
    added.add_argument("overrides", nargs="+", metavar="model.key=value", help="what makes the model one of experts")
    added.add_argument(
        "--noise", type=float, default=0.0, metavar="S", help="relative noise, to tell experts apart (default: none)"
    )
    added.add_argument("--seed", type=int, help="of the noise and the router; default: the run's")

    added = command("average", average, AVERAGE)
    added.add_argument(
        "folders", type=Path, nargs="+", metavar="SOURCE", help="two or more, then the RUN_FOLDER to make"
    )
    added.add_argument("--weights", choices=("model", "master", "ema"), help="default: ema, if the first has one")
    for known in ("export", "upcycle", "average"):
        commands.choices[known].add_argument(
            "--no-verify", action="store_true", help="do not compare a checkpoint's sha256 first, which reads all of it"
        )
    added.add_argument("--ratios", type=float, nargs="+", metavar="R", help="shares of the sources; default: equal")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for source in [args.source] if hasattr(args, "source") else args.folders[:-1]:
            if not source.exists():
                raise ValueError(f"{source} does not exist")
        status = args.run_command(args)
        sys.stdout.flush()
        return status
    except ValueError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"convert_checkpoint: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
