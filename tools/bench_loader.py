"""Measure what the loader of encoded data sets delivers, beside what a GPU could train on in the same time.

    python tools/bench_loader.py                                      # sets of 3 GB each in the current folder
    python tools/bench_loader.py --gigabytes 20 --folder /scratch --json loader.json

Writes data sets of random numbers in the real format, reads them as a training would, one epoch in the order of its
steps, and removes them. Latents are [8, 32, 32], so 256 pixels, and all of a caption's tokens are real: the most there
is to read. Everything is bfloat16.

  text        tokens x width of a caption's states: 77 x 1024 is CLIP's and small T5s', 256 x 4096 is T5-XXL's
  GPU         samples per second that an H200 trains on: ec-dit-xl at 50 % of its rate, three times the forward's FLOPs
  cold, warm  samples per second that come out of the loader, with the shards' pages dropped from memory before and then
              once more with those that stayed; each with gigabytes per second, and as so many times the GPU's
  from disk   part of what was read cold that the kernel fetched from a device
  CPU         microseconds of processor time for a sample in the warm pass, however busy the machine is otherwise

Pages are dropped by posix_fadvise, for which one need not be root. It empties this machine's memory, not the disk's
own caches, so what a cold disk delivers is found with sets larger than both.

The first lines are about an index of many samples, made up and without data: what opening it and finding the samples of
many random steps adds to the memory of a process at its peak, first of a thousandth of the samples, then of all.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

INDEX_BUCKETS, INDEX_SHARD, INDEX_STEPS = 5, 4096, 250


def arguments() -> argparse.Namespace:
    """What the user asks for; ends the process with a message where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of each data set (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="samples of a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=4, help="that read ahead (default: %(default)s)")
    parser.add_argument("--ahead", type=int, default=4, help="steps that are read ahead (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="that the benchmark may use (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=10**7, help="samples of the index (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure (default: here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    args = parser.parse_args()
    for name in ("gigabytes", "batch", "threads", "ahead", "cores"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} is not more than 0")
    least = 2000 * INDEX_BUCKETS * args.batch
    if args.entries < least:
        parser.error(f"--entries: at least {least}, so that a thousandth of them still fills batches in all buckets")
    if not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: there is no such folder")
    free = shutil.disk_usage(args.folder).free / 1e9
    if 1.1 * args.gigabytes > free:
        parser.error(f"--folder {args.folder} has {free:.1f} GB free; lower --gigabytes")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds
    arguments()

import numpy as np
import torch

from megadit.data.encoded import EncodedLoader
from megadit.data.manifest import SHARDS_FOLDER, Bucket, Manifest, ShardEntry, shard_path, write_manifest
from megadit.data.mixture import Mixture, Source, Wanted, open_sources
from megadit.data.shards import Caption, Sample, write_empty, write_shard
from megadit.model.config import PRESETS, ECDiTConfig
from megadit.model.count import PAPER_TEXT, forward_flops
from megadit.planning.hardware import GPUS

MODEL, GPU, EFFICIENCY = "ec-dit-xl", "h200", 0.5
LATENT = (8, 32, 32)
TEXTS = {"77 x 1024": (77, 1024), "256 x 4096": (256, 4096)}


@dataclass(frozen=True)
class Setting:
    """gigabytes: of each data set. batch: samples of a step."""

    gigabytes: float
    batch: int
    threads: int
    ahead: int
    entries: int


@dataclass(frozen=True)
class Row:
    """What was measured of one kind of text.

    disk: bytes that the kernel fetched from a device in the cold pass. cpu: seconds for a sample in the warm pass.
    """

    text: str
    samples: int
    sample_bytes: int
    wanted: float
    cold: float
    warm: float
    disk: int
    cpu: float

    def line(self) -> str:
        def rate(found: float) -> str:
            return f"{found:8.0f} {found * self.sample_bytes / 1e9:6.2f} {found / self.wanted:6.1f}x"

        fetched = 100 * self.disk / (self.samples * self.sample_bytes)
        rates = f"{rate(self.cold)} {rate(self.warm)}"
        return f"{self.text:<11} {self.wanted:7.0f} {rates} {fetched:7.0f} % {1e6 * self.cpu:5.0f}"


@dataclass(frozen=True)
class IndexRow:
    """An index of so many samples: bytes that a process grows by at its peak, and the seconds of finding a step's."""

    entries: int
    grown: int
    seconds: float

    def line(self) -> str:
        return (
            f"index of {self.entries:,} samples in shards of {INDEX_SHARD:,}: {self.grown / 1e6:.1f} MB more at the "
            f"peak, {self.seconds * 1e3:.2f} ms to find a step's samples"
        )


def consumed(tokens: int, channels: int) -> float:
    """Samples per second that the GPU trains on."""
    config = ECDiTConfig(**PRESETS[MODEL])
    text = replace(PAPER_TEXT, length=tokens, channels=channels)
    return EFFICIENCY * GPUS[GPU].rate("bfloat16") / (3 * forward_flops(config, text))


def write_set(folder: Path, samples: int, tokens: int, channels: int, shard: int) -> None:
    """A data set of random samples, each with one caption."""
    generator = torch.Generator().manual_seed(0)
    # Samples are windows of one block, each at a place of its own: drawing every number would take longer than writing.
    block = torch.randn(4 * tokens * channels, generator=generator).bfloat16()

    def window(shape: tuple[int, ...]) -> torch.Tensor:
        size = int(np.prod(shape))
        begin = int(torch.randint(len(block) - size, (), generator=generator))
        return block[begin : begin + size].view(shape)

    def sample(number: int) -> Sample:
        return Sample(f"{number:09d}", window(LATENT), [Caption(window((tokens, channels)))])

    (folder / SHARDS_FOLDER).mkdir(parents=True)
    shards = [
        write_shard(
            shard_path(folder, f"{begin:09d}.safetensors"),
            [sample(number) for number in range(begin, min(begin + shard, samples))],
        )
        for begin in range(0, samples, shard)
    ]
    write_empty(folder, Caption(window((1, channels))))
    write_manifest(folder, Manifest("bfloat16", None, "mean", "t5", ({"kind": "t5"},), (bucket_of(256, shards),)))


def bucket_of(size: int, shards: list[ShardEntry]) -> Bucket:
    return Bucket(size, size, LATENT, tuple(shards))


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget what it has of a data set in memory."""
    for path in (folder / SHARDS_FOLDER).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fetched_bytes() -> int:
    """What this process has had fetched from devices until now; 0 where the kernel does not tell."""
    try:
        told = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in told.splitlines() if line.startswith("read_bytes"))


def epoch_seconds(folder: Path, tokens: int, setting: Setting) -> float:
    """Seconds of all steps of an epoch, from a loader that has read nothing yet."""
    wanted = Wanted(setting.batch, length=tokens, heldout=0)
    loader = EncodedLoader(Mixture(open_sources([folder]), wanted), 0, 0, 1, setting.threads, setting.ahead)
    began = time.perf_counter()
    for step in range(1, loader.order.steps_through(0) + 1):
        assert len(loader.batch(step)) == setting.batch
    seconds = time.perf_counter() - began
    loader.close()
    return seconds


def measure(folder: Path, setting: Setting) -> Iterator[Row]:
    """Every kind of text, each in a data set of its own that is there only meanwhile."""
    for text, (tokens, channels) in TEXTS.items():
        sample_bytes = 2 * (int(np.prod(LATENT)) + tokens * channels)
        steps = max(1, round(setting.gigabytes * 1e9 / sample_bytes / setting.batch))
        with tempfile.TemporaryDirectory(prefix="bench_loader_", dir=folder) as place:
            path, samples = Path(place), steps * setting.batch
            write_set(path, samples, tokens, channels, shard=max(1, round(256e6 / sample_bytes)))
            drop_pages(path)
            before = fetched_bytes()
            cold = samples / epoch_seconds(path, tokens, setting)
            disk = fetched_bytes() - before
            began = time.process_time()
            warm = samples / epoch_seconds(path, tokens, setting)
            cpu = (time.process_time() - began) / samples
        yield Row(text, samples, sample_bytes, consumed(tokens, channels), cold, warm, disk, cpu)


def made_up(entries: int) -> Manifest:
    """The manifest of so many samples, of which there are no shards."""
    each = entries // INDEX_BUCKETS
    buckets = []
    for number in range(INDEX_BUCKETS):
        sizes = [min(INDEX_SHARD, each - begin) for begin in range(0, each, INDEX_SHARD)]
        shards = [
            ShardEntry(f"{number}_{i:09d}.safetensors", size, size, 77, 0, size * 174080, f"{i:064d}", f"{i:064d}")
            for i, size in enumerate(sizes)
        ]
        buckets.append(bucket_of(256 + 64 * number, shards))
    return Manifest("bfloat16", None, "mean", "t5", ({"kind": "t5"},), tuple(buckets))


def memory(which: str) -> int:
    """Bytes of this process: VmRSS, now, or VmHWM, at the peak."""
    told = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in told.splitlines() if line.startswith(f"{which}:"))


def forget_peak() -> int:
    """The next peak counts from now on; the bytes of this process now. Importing has been a peak of its own."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def index_row(entries: int, batch: int, folder: Path) -> IndexRow:
    """What is measured of one index; `folder` has an empty caption."""
    before = forget_peak()
    mixture = Mixture([Source(folder, made_up(entries))], Wanted(batch, length=77))
    loader = EncodedLoader(mixture, 0, 0, 1)
    steps = np.random.default_rng(0).integers(1, 10**7, INDEX_STEPS).tolist()
    began = time.perf_counter()
    for step in steps:
        found = loader.order.places(step)
        assert len(mixture.locate("train", 0, found.bucket, found.index_B)) == batch
    seconds = (time.perf_counter() - began) / len(steps)
    return IndexRow(entries, memory("VmHWM") - before, seconds)


def measure_index(setting: Setting) -> list[IndexRow]:
    """A thousandth of the entries, then all; each in a process of its own, for freed memory would be used again."""
    with tempfile.TemporaryDirectory() as folder:
        write_empty(Path(folder), Caption(torch.zeros(1, 1024)))
        sizes = (setting.entries // 1000, setting.entries)
        rows = []
        for entries in sizes:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                rows.append(process.submit(index_row, entries, setting.batch, Path(folder)).result())
        return rows


def main() -> int:
    args = arguments()
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    setting = Setting(args.gigabytes, args.batch, args.threads, args.ahead, args.entries)
    print(f"{len(cores)} cores, steps of {args.batch} samples, {args.threads} threads, in {args.folder.resolve()}")
    index = measure_index(setting)
    for entry in index:
        print(entry.line())
    rates = " ".join(f"{name:>8} {'GB/s':>6} {'of GPU':>7}" for name in ("cold", "warm"))
    print(f"{'text':<11} {'GPU':>7} {rates} from disk   CPU")
    rows = []
    for row in measure(args.folder, setting):
        rows.append(row)
        print(row.line(), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory, writing the sets and reading them: {peak / 1e9:.2f} GB")
    if args.json is not None:
        told = {
            "setting": asdict(setting),
            "hardware": {"machine": platform.machine(), "cores": len(cores), "load": os.getloadavg()[0]},
            "gpu": {"name": GPU, "model": MODEL, "efficiency": EFFICIENCY},
            "rows": [asdict(row) for row in rows],
            "index": [asdict(entry) for entry in index],
        }
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
