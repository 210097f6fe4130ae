"""Time how long a training stands still for a checkpoint: saved at once, and saved in the background.

    python tools/bench_checkpoint.py                                        # 0.5 GB on 2 ranks, into the current folder
    python tools/bench_checkpoint.py --gigabytes 4 --ranks 4 --folder /scratch --json checkpoint.json
    python tools/bench_checkpoint.py --device cuda --ranks 8 --gigabytes 80 --folder /lustre/me

The state is made up, of the kinds and types that a bfloat16 training under ZeRO has: for each parameter a bfloat16
weight and four float32 numbers (master, two moments, average), 18 bytes. Every rank holds an equal part, cut by rows,
and writes it as megadit.train does: planned over all ranks, one safetensors file per rank with its sha256, flushed to
the disk, then committed.

  sync        checkpoint.async=false: training stands still until the checkpoint is complete
  async       checkpoint.async=true: it stands still for the copy into host memory; a thread does the rest

Both take turns, round after round, so that a disk that slows down slows both. Each has one round before, which is not
counted: the first background save also takes its host memory from the system, and is shown as "first".

  stall       seconds that the training waits, on the rank that waits longest: median and quartiles over the rounds
  whole       seconds from the start of the save until the checkpoint is complete
  GB/s        size over whole
  peak        host memory of the largest process, state included; async needs the state's size more. With a GPU the
              state itself lies there

The folder needs room for three checkpoints: one of each way, and the one that is being written. Memory: the size once
for the state (on the GPU, with one), and once for the copy. Nothing else should use the disk or the cores meanwhile. A
disk that is not the training's says nothing about the training.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A number above 0, for argparse."""

    def parse(text: str) -> int | float:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return number

    parse.__name__ = kind.__name__
    return parse


def arguments() -> argparse.Namespace:
    """What the user asks for; ends the process with a message where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    natural, real = positive(int), positive(float)
    parser.add_argument(
        "--gigabytes", type=real, default=0.5, help="of the checkpoint, 1e9 bytes (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=natural, default=2, help="processes on this machine (default: %(default)s)")
    parser.add_argument("--repeats", type=natural, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure (default: here)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the state is; auto: a GPU if there is one",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: there is no such folder")
    needed, free = 3 * args.gigabytes, shutil.disk_usage(args.folder).free / 1e9
    if needed > free:
        parser.error(f"--folder {args.folder} has {free:.1f} GB free, this needs {needed:.1f} GB; lower --gigabytes")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: that is a folder, or there is no folder {args.json.parent}")
    import torch  # last: it takes seconds

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "auto":
        args.device = "cuda" if gpus else "cpu"
    if args.device == "cuda" and args.ranks > gpus:
        parser.error(f"--device cuda: --ranks {args.ranks}, but torch sees {gpus} GPUs here")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds
    arguments()

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megadit.checkpoint import LogicalTensor, Piece, Saver
from megadit.runtime.launch import process_group

KINDS = {"weight": torch.bfloat16, **dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "ema"), torch.float32)}
BYTES_PER_PARAMETER = sum(dtype.itemsize for dtype in KINDS.values())
COLUMNS, MOST_ROWS = 1024, 4096  # of one made-up parameter


@dataclass(frozen=True)
class Setting:
    """What is saved: `gigabytes` (1e9 bytes) in all, by `ranks` processes, from `device`, into `folder`."""

    gigabytes: float
    ranks: int
    device: str
    folder: str
    repeats: int


@dataclass(frozen=True)
class Row:
    """One way to save. Seconds of the slowest rank: of each counted round, and of the round before them."""

    name: str
    stall_seconds: list[float]
    whole_seconds: list[float]
    first_stall_seconds: float
    peak_bytes: int

    def spread(self) -> str:
        """Median and quartiles of the stalls."""
        low, middle, high = (
            quantiles(self.stall_seconds, n=4) if len(self.stall_seconds) > 1 else self.stall_seconds * 3
        )
        return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def made_up_state(setting: Setting, rank: int, device: torch.device) -> dict[str, LogicalTensor]:
    """This rank's rows of made-up parameters; no two of them alike, so that nothing is saved by compression."""
    rows = max(1, round(setting.gigabytes * 1e9 / BYTES_PER_PARAMETER / COLUMNS / setting.ranks))  # of this rank
    generator = torch.Generator(device).manual_seed(rank)
    state, index = {}, 0
    while rows > 0:
        height = min(rows, MOST_ROWS)
        for kind, dtype in KINDS.items():
            part = torch.empty(height, COLUMNS, dtype=dtype, device=device).normal_(generator=generator)
            whole = (height * setting.ranks, COLUMNS)
            state[f"{kind}.layer_{index:04d}"] = LogicalTensor(whole, dtype, (Piece((height * rank, 0), part),))
        rows, index = rows - height, index + 1
    return state


def slowest(seconds: float) -> float:
    """The largest of all ranks' numbers."""
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    return max(everyone)


def timed_save(saver: Saver, step: int, state: dict[str, LogicalTensor]) -> tuple[float, float]:
    """(seconds that training waits, seconds until the checkpoint is complete). Raises when it could not be saved."""
    dist.barrier()
    start = time.perf_counter()
    saver.save(step, state, {})
    stall = time.perf_counter() - start
    saver.wait()
    whole = time.perf_counter() - start
    if saver.failure is not None:
        raise RuntimeError(saver.failure)
    return slowest(stall), slowest(whole)


def peak_host_bytes() -> int:
    """Of the process that has had the most until now."""
    return int(slowest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def contest(setting: Setting, rank: int, device: torch.device) -> tuple[int, list[Row]]:
    """(bytes of the state on all ranks, what was measured of each way to save). Collective."""
    state = made_up_state(setting, rank, device)
    size = sum(piece.tensor.nbytes for tensor in state.values() for piece in tensor.pieces)
    folder = Path(setting.folder)
    savers = {name: Saver(folder / name, keep=1, background=name == "async") for name in ("sync", "async")}
    firsts, peaks = {}, {}
    for name, saver in savers.items():  # in this order: a peak cannot go down again
        firsts[name], _ = timed_save(saver, 0, state)
        peaks[name] = peak_host_bytes()
    rounds = [
        {name: timed_save(saver, step, state) for name, saver in savers.items()}
        for step in range(1, setting.repeats + 1)
    ]
    rows = [
        Row(name, [each[name][0] for each in rounds], [each[name][1] for each in rounds], firsts[name], peaks[name])
        for name in savers
    ]
    return size * setting.ranks, rows


def run_rank(rank: int, setting: Setting, port: int, out: str) -> None:
    """One of the processes; the first one writes what was measured to `out`."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if setting.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with process_group() as process:
        size, rows = contest(setting, rank, process.device)
        if rank == 0:
            Path(out).write_text(json.dumps({"bytes": size, "rows": [asdict(row) for row in rows]}))


def measure(setting: Setting) -> tuple[int, list[Row]]:
    """`contest` on as many new processes as the setting says."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    out = Path(setting.folder) / "measured.json"
    multiprocessing.spawn(run_rank, (setting, port, str(out)), setting.ranks)  # type: ignore[no-untyped-call]
    found = json.loads(out.read_text())
    return found["bytes"], [Row(**row) for row in found["rows"]]


def stall_ratio(rows: list[Row]) -> float:
    """How much of a sync save's stall an async one has: the median of the rounds' ratios."""
    sync, background = rows
    return median(b / a for a, b in zip(sync.stall_seconds, background.stall_seconds, strict=True))


def table(size: int, rows: list[Row]) -> str:
    """One line for each way to save, and the ratio of their stalls."""
    lines = [f"{'':6s} {'stall s [quartiles]':>24s} {'first':>8s} {'whole s':>8s} {'GB/s':>6s} {'peak GB':>8s}"]
    for row in rows:
        whole = median(row.whole_seconds)
        lines.append(
            f"{row.name:6s} {row.spread():>24s} {row.first_stall_seconds:8.3f} {whole:8.3f} {size / whole / 1e9:6.2f} "
            f"{row.peak_bytes / 1e9:8.2f}"
        )
    lines.append(f"stall of async / stall of sync: {stall_ratio(rows):.3f}")
    return "\n".join(lines)


def as_json(setting: Setting, size: int, rows: list[Row]) -> dict[str, Any]:
    """What goes into the file; it has the times of all rounds, so that any statistic can be taken later."""
    medians = {
        row.name: {
            "stall_seconds": median(row.stall_seconds),
            "gigabytes_per_second": size / median(row.whole_seconds) / 1e9,
        }
        for row in rows
    }
    return {
        "setting": asdict(setting),
        "bytes": size,
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [asdict(row) for row in rows],
        "medians": medians,
        "stall_ratio": stall_ratio(rows),
    }


def main() -> int:
    args = arguments()
    # A folder of its own, gone at the end whatever happens: checkpoints are large.
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=args.folder) as folder:
        setting = Setting(args.gigabytes, args.ranks, args.device, folder, args.repeats)
        print(f"{args.gigabytes} GB on {args.ranks} ranks ({args.device}), into {args.folder.resolve()}", flush=True)
        size, rows = measure(setting)
    print(table(size, rows))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(setting, size, rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
