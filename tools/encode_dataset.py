"""Encode images and captions once: latents of an autoencoder and states of text encoders, in shards to train on.

  python tools/encode_dataset.py photos/ --out data/photos --autoencoder stabilityai/sd-vae-ft-mse \\
      --clip openai/clip-vit-large-patch14 --resolution 256

  torchrun --nproc-per-node 8 tools/encode_dataset.py tars/*.tar --out data/web --autoencoder models/flux/vae \\
      --t5 models/flux --clip models/flux --text-length 256 --resolution 256 512 1024 --latents sample

  python tools/encode_dataset.py --verify --out data/web

SOURCES, in any mixture:
  x.tar        WebDataset: 0001.jpg (jpeg, png, webp) with 0001.txt, a caption, or 0001.json, an object of
               "caption" or "captions", "weights" (how often each is drawn) and "label" (the number of a class)
  x.parquet    columns image (bytes, or {bytes, path}), caption or captions, weights, label; --column renames them
  x.jsonl      lines {"file": "a/b.jpg", "caption": "..."}, fields as above, files beside it
  a folder     its captions.jsonl, else what is in it and below: tars, parquet files, and images with .txt or .json
               beside them

An image is brought to the bucket of the nearest aspect ratio, at the largest --resolution that it fills: scaled to
cover it (Lanczos), and its middle cut out. EXIF's orientation is heeded, transparency put on white.

A sample that cannot be used is never fatal: OUT/quarantine.jsonl says its key and the reason. Killed or stopped, the
same command goes on: what is finished stays, and the data set comes out byte for byte as if nothing had happened, also
on another number of processes. Samples are finished in units of --unit, each of which fills one shard per bucket.

Without --t5 and --clip no text is encoded, and each sample needs a label: for class conditioning.
Encoders are a folder, or a name in the Hub's cache of this machine; --online downloads what is not there.

Exit status: 0; 2 when the input is refused, or --verify finds a fault; 75 when stopped by SIGTERM or SIGUSR1, and 76
when a process or the disk failed: the same command goes on; 130 after Ctrl-C, which can go on, too.
"""

# ruff: noqa: E402 (the signals come first)
from __future__ import annotations

if __name__ == "__main__":
    from megadit.runtime.stopping import leave_on_signals

    leave_on_signals()  # the imports below take seconds

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megadit.runtime.environment import LaunchError, NotMet
from megadit.runtime.log import setup_logging
from megadit.runtime.status import BAD_INPUT, FINISHED, LOST, STOPPED
from megadit.runtime.stopping import StopRequests
from megadit.runtime.tool import refuse_early

if TYPE_CHECKING:
    import torch

    from megadit.data.encode_folder import Report
    from megadit.data.encode_unit import EncodeConfig
    from megadit.data.frozen import Frozen
    from megadit.runtime.launch import Process

logger = logging.getLogger("megadit")

INTERRUPTED = 130
T5_LENGTH = 256
TELL_S = 60.0  # between lines, where there is no terminal
INDEXING = timedelta(hours=3)  # that a rank may wait for another's tars to be looked through


def number(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = whole.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="tars, parquet files, .jsonl files, folders")
    add("--out", type=Path, required=True, metavar="OUT", help="the data set's folder; goes on with what is there")
    add("--verify", action="store_true", help="read every byte of the finished data set OUT and compare checksums")

    encoders = whole.add_argument_group("encoders")
    add = encoders.add_argument
    add("--autoencoder", metavar="NAME", help='an AutoencoderKL, or "pixels" to train on pixels themselves')
    add("--t5", default="", metavar="NAME", help="a T5 encoder")
    add("--clip", default="", metavar="NAME", help="a CLIP text encoder; with --t5, only its pooled vector is used")
    add(
        "--text-length",
        type=number,
        metavar="N",
        help=f"tokens of a caption that are kept (default: {T5_LENGTH} of T5, all that CLIP reads)",
    )
    for name in ("autoencoder", "t5", "clip"):
        add(f"--{name}-revision", default="", metavar="REV", help="a branch, tag or commit on the Hub")
    add("--online", action="store_true", help="download encoders that are not on this machine")
    add("--compute", choices=("float32", "bfloat16"), default="float32", help="their precision (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")

    images = whole.add_argument_group("images")
    add = images.add_argument
    add("--resolution", type=number, nargs="+", default=[256], metavar="SIDE", help="in pixels (default: 256)")
    add("--square", action="store_true", help="squares alone, in place of several aspect ratios")
    add("--max-aspect", type=float, default=2.0, metavar="A", help="longest to shortest side (default: %(default)g)")
    add("--patch", type=number, default=2, help="of the network, in cells: sides are multiples (default: %(default)s)")
    add("--min-size", type=number, metavar="SIDE", help="of the shorter side (default: half the least resolution)")
    add("--max-pixels", type=number, metavar="N", help="of an image before it is scaled (default: 80 million)")

    output = whole.add_argument_group("output")
    add = output.add_argument
    add("--latents", choices=("mean", "sample"), default="mean", help="of the posterior (default: %(default)s)")
    add("--seed", type=int, default=0, help="of --latents sample (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is stored (default: %(default)s)")
    add("--batch", type=number, default=32, help="images that are encoded together (default: %(default)s)")
    add("--unit", type=number, default=1000, help="samples that are finished together (default: %(default)s)")
    add("--threads", type=number, default=4, help="that decode images, per process (default: %(default)s)")
    add(
        "--column",
        action="append",
        default=[],
        metavar="WHAT=NAME",
        help="of parquet, as caption=TEXT; may be repeated",
    )
    return whole


class Progress:
    """A bar with images per second and the time left over all processes; without a terminal, a line a minute."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.began = self.told = 0.0

    def __call__(self, done: int, total: int, before: int) -> None:
        now = time.monotonic()
        if self.bar is None:
            self.bar = tqdm(
                desc="encode", total=total, initial=before, unit=" images", dynamic_ncols=True, disable=None
            )
            self.began = self.told = now
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
        elif now - self.told >= TELL_S:
            self.told = now
            rate = max(done - before, 1) / (now - self.began)
            left = timedelta(seconds=round((total - done) / rate))
            logger.info("%d of %d images, %.1f a second, %s left", done, total, rate, left)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def config_of(args: argparse.Namespace, downscale: int) -> EncodeConfig:
    """Raises ValueError that says what to change."""
    import torch

    from megadit.data.buckets import BucketRule
    from megadit.data.encode_unit import EncodeConfig
    from megadit.data.images import MAX_PIXELS
    from megadit.data.tables import Columns

    known = [field.name for field in fields(Columns)]
    columns: dict[str, str] = {}
    for pair in args.column:
        what, _, name = pair.partition("=")
        if what not in known or not name:
            raise ValueError(f"--column {pair}: write WHAT=NAME, WHAT one of {', '.join(known)}")
        columns[what] = name
    resolutions = tuple(sorted(set(args.resolution)))
    return EncodeConfig(
        BucketRule(resolutions, downscale * args.patch, args.max_aspect, args.square),
        args.latents,
        getattr(torch, args.dtype),
        getattr(torch, args.compute),
        args.unit,
        args.batch,
        args.min_size or max(1, resolutions[0] // 2),
        args.max_pixels or MAX_PIXELS,
        args.seed,
        Columns(**columns),
    )


def load(args: argparse.Namespace, device: torch.device) -> Frozen:
    """The encoders. Raises ValueError that says what to change."""
    import torch

    from megadit.data.frozen import Frozen, Pixels
    from megadit.encoders.autoencoder import Autoencoder
    from megadit.encoders.frozen_text import FrozenText

    dtype, online, length = getattr(torch, args.compute), args.online, args.text_length
    t5 = clip = None
    if args.t5:
        t5 = FrozenText.load("t5", args.t5, length or T5_LENGTH, device, dtype, args.t5_revision, online)
    if args.clip:
        clip = FrozenText.load("clip", args.clip, None if t5 else length, device, dtype, args.clip_revision, online)
    if args.autoencoder == "pixels":
        return Frozen(Pixels(), t5, clip)
    return Frozen(Autoencoder.load(args.autoencoder, device, dtype, args.autoencoder_revision, online), t5, clip)


def run(args: argparse.Namespace, process: Process, stops: StopRequests) -> None:
    """Encode, and print the report. Collective."""
    from megadit.data.encode import encode
    from megadit.runtime.agreement import together

    with together():
        if args.device == "cuda" and process.device.type != "cuda":
            raise ValueError("--device cuda, but torch sees no CUDA device here")
        frozen = load(args, process.device)
        config = config_of(args, frozen.autoencoder.downscale)
    progress = Progress()
    try:
        report = encode(process, args.sources, args.out, config, frozen, stops, progress, args.threads)
    finally:
        progress.close()
    if process.is_main:
        print(as_text(report, args.out), flush=True)


def as_text(report: Report, out: Path) -> str:
    """The report, for people."""
    bad = sum(report.bad.values())
    lines = [f"{out}: {report.samples} samples, {report.captions} captions, {bad} samples left out"]
    lines += [f"{count:12} of {shape}" for shape, count in report.buckets.items()]
    lines += [f"{count:12} captions cut for {kind}" for kind, count in report.cut.items() if count]
    lines += [f"{count:12} left out: {reason}" for reason, count in report.bad.items()]
    return "\n".join([*lines, f"see {out / 'quarantine.jsonl'}"] if bad else lines)


def verify(args: argparse.Namespace) -> int:
    if not args.out.exists():
        print(f"bad: data set {args.out}: there is no such folder")
        return BAD_INPUT
    from megadit.data.manifest import open_manifest

    try:
        manifest = open_manifest(args.out, verify=True)
    except ValueError as error:
        print(f"bad: {error}")
        return BAD_INPUT
    print(f"good: {args.out}, {manifest.samples} samples")
    return FINISHED


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that says what to change."""
    if not args.sources:
        raise ValueError("no sources: name tars, parquet files or folders")
    if not args.autoencoder:
        raise ValueError('--autoencoder is missing: name an AutoencoderKL, or "pixels"')


def check_exist(sources: Sequence[str]) -> None:
    """Raises ValueError naming a source that is not there."""
    missing = [source for source in sources if not Path(source).expanduser().exists()]
    if missing:
        from megadit.data.sources import find

        find(missing)  # the message depends on the kind


def main(argv: Sequence[str] | None = None) -> int:
    """Encode. Returns the exit status."""
    args = parser().parse_args(argv)
    if args.verify:
        return verify(args)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    stops = StopRequests()
    try:
        check(args)
        refuse_early("encode_dataset", partial(check_exist, args.sources))
        from megadit.runtime.launch import process_group

        with process_group(INDEXING) as process:
            setup_logging(process.rank)
            return attempt(args, process, stops)
    except LaunchError as error:
        print(f"encode_dataset: {error}", file=sys.stderr)
        return LOST if isinstance(error, NotMet) else BAD_INPUT
    except ValueError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"encode_dataset: {error}", file=sys.stderr)
        return BAD_INPUT
    finally:
        stops.close()


def attempt(args: argparse.Namespace, process: Process, stops: StopRequests) -> int:
    """Encode, and say why it ended before its end. Returns the exit status. Raises ValueError."""
    from torch.distributed import DistError

    from megadit.data.encode import Lost, Stopped

    try:
        run(args, process, stops)
    except Stopped as stopped:
        if process.is_main:
            print(f"encode_dataset: {stopped}; the same command goes on", file=sys.stderr)
        return STOPPED
    except (Lost, OSError, DistError) as error:
        if isinstance(error, Lost) and error.__cause__ is not None:  # what nobody expected, of this process alone
            traceback.print_exception(error.__cause__)
        print(f"encode_dataset: process {process.rank}: {error}; the same command goes on", file=sys.stderr)
        return LOST
    except ValueError:  # refused, alike on every process
        raise
    except Exception:
        traceback.print_exc()
        print(f"encode_dataset: process {process.rank} failed; the same command goes on", file=sys.stderr)
        return LOST
    except KeyboardInterrupt:
        print("encode_dataset: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
