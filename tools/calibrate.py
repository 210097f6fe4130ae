"""Measure this machine for tools/plan.py, and see how well plans then predict the seconds of a step.

    python tools/calibrate.py --out mine.yaml               # measure, and write a GPU that tools/plan.py --gpu takes
    python tools/calibrate.py --judge mine.yaml             # train six other layouts, and compare with their plans
    python tools/calibrate.py --out mine.yaml --judge --json calibration.json         # both, and keep all numbers

Measuring has two parts. Benchmarks of a minute find the machine's own rates: matrix products and copies of one
process, messages between processes. Then three short trainings of small models (one process; tensor 2; pipeline 2 x
expert 2) say what of those rates a training gets, and what each kernel and each message costs however small: those
efficiencies with which plans come nearest to the measured seconds of a step, and which are not far from what the
benchmarks found, for three numbers alone do not tell six. The judged layouts are none of the three.

Trainings take turns, a round of all of them after another, and a training's time is the median over its steps, the
first ones left out. Nothing else should run meanwhile. On CPUs a process has one thread, and processes may be more than
cores; on GPUs the models are larger, every process has a GPU, and layouts of more processes than GPUs are left out.

The exit status is 0; 1 when the rank correlation of the judged layouts is below 0.8 or their median error above 25%;
2 for bad input.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from megadit.planning.hardware import load_gpu
from megadit.runtime.tool import refuse_early


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/calibrate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="measure this machine, and write the GPU there, as YAML"
    )
    parser.add_argument(
        "--judge",
        nargs="?",
        const="",
        metavar="GPU",
        help="compare plans with trainings that it was not made from: a file of --out (default: that of this --out)",
    )
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each layout (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured and predicted there")
    parser.add_argument("--benchmark", help=argparse.SUPPRESS)  # on every process, by `run_benchmarks`
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError before anything is measured in vain."""
    if args.benchmark:
        return
    if args.out is None and args.judge is None:
        raise ValueError("nothing to do; give --out FILE to measure this machine, --judge GPU to try what was measured")
    if args.judge == "" and args.out is None:
        raise ValueError("--judge needs a GPU: a file that --out wrote, or --out itself")
    if args.steps < 1 or args.rounds < 1:
        raise ValueError(f"--steps {args.steps} and --rounds {args.rounds} must be 1 or more")
    for name, path in (("--out", args.out), ("--json", args.json)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{name} {path}: that is a folder, or there is no folder {path.parent}")
    if args.judge:
        load_gpu(args.judge)
    if args.out is not None and args.out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out {args.out}: tools/plan.py knows a file by its ending; use .yaml")


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("calibrate", lambda: check_arguments(arguments(None)))

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from megadit.planning.dry_run import table
from megadit.planning.hardware import Efficiency, Gpu
from megadit.planning.plan import Plan, Planner
from megadit.planning.simulation import fake_world
from megadit.planning.timing import messages
from megadit.runtime.launch import process_group
from megadit.training.config import DTYPES, check, load_config
from megadit.training.metrics import METRICS_FILE, read_metrics

MISSED, BAD_INPUT = 1, 2  # exit statuses
LEAST_CORRELATION, MOST_ERROR = 0.8, 0.25  # what the judged layouts have to reach
CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "digits.yaml"
# The model that docs/planning.md has figures of; the example's own is narrower.
MODEL = ("model.head_width=32", "text.length=28", "text.vocabulary=96", "text.pieces=unigram")
WARMUP = 3  # steps left out: the first ones make buffers
CPU_RANKS = 8  # processes among which a machine's memory is divided


@dataclass(frozen=True)
class Case:
    """A layout of a small model. width: of the model, for CPUs."""

    name: str
    processes: int
    width: int
    options: tuple[str, ...] = ()

    def overrides(self, device: str) -> list[str]:
        """What differs from the configuration file."""
        larger = 8 if device == "cuda" else 1  # so that a GPU has something to do
        options = [*MODEL, f"model.width={self.width * larger}", *self.options]
        return [*options, "run.dtype=bfloat16", "zero.stage=1"] if device == "cuda" else options


TENSOR, PIPELINE, EXPERT = "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"
MEASURED = (
    Case("one process", 1, 192, ("zero.stage=0",)),
    Case("tensor 2", 2, 96, (TENSOR, "model.layers=6", "data.global_batch=32")),
    Case("pipeline 2 x expert 2", 4, 128, (PIPELINE, EXPERT, "data.micro_batch=8")),
)
JUDGED = (
    Case("one process, recompute block", 1, 288, ("run.recompute=block",)),
    Case("data 2, eight layers", 2, 192, ("model.layers=8",)),
    Case("tensor 4", 4, 128, ("parallel.tensor=4", "model.kv_heads=4", "zero.stage=0")),
    Case("expert 2 x data 2, 16 experts", 4, 96, (EXPERT, "model.experts=16", "data.global_batch=32")),
    Case(
        "pipeline 2, interleaved, recompute moe",
        2,
        128,
        (PIPELINE, "parallel.schedule=interleaved", "model.layers=8", "data.micro_batch=8", "run.recompute=moe"),
    ),
    Case(
        "tensor 2 x pipeline 2, sequence, zbv",
        4,
        160,
        (TENSOR, PIPELINE, "parallel.sequence=true", "parallel.schedule=zbv", "data.micro_batch=16", "zero.stage=0"),
    ),
)


# Running


def torchrun(processes: int, *command: str) -> None:
    """Start processes of this machine and wait for them. Raises RuntimeError with what they said when one fails."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*started, *command], capture_output=True, text=True, env=environ)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed on {processes} processes:\n{done.stderr[-3000:]}")


def train(case: Case, device: str, steps: int) -> list[float]:
    """Seconds of each step of one training, without the first ones."""
    quiet = ["log.every=1", "log.evaluate_every=0", "log.sample_every=0", "log.tensorboard=false"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "-m",
            "megadit.train",
            "--config",
            str(CONFIG),
            f"run.dir={folder}/run",
            f"run.steps={steps + WARMUP}",
        ]
        torchrun(case.processes, *command, *quiet, *case.overrides(device))
        lines = read_metrics(Path(folder) / "run" / METRICS_FILE)
    return [line["seconds"] for line in lines][WARMUP:]


@dataclass(frozen=True)
class Measurement:
    """Seconds of all steps of a case, by training."""

    case: Case
    rounds: list[list[float]]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return median(seconds for steps in self.rounds for seconds in steps)

    @property
    def noise(self) -> float:
        """How far apart the medians of the trainings are, as a part of the seconds of a step."""
        medians = [median(steps) for steps in self.rounds]
        return (max(medians) - min(medians)) / self.seconds


def measure(cases: Sequence[Case], device: str, steps: int, rounds: int) -> list[Measurement]:
    """Train all cases in turns."""
    found: dict[Case, list[list[float]]] = {case: [] for case in cases}
    with tqdm(total=rounds * len(cases), unit="training", dynamic_ncols=True, leave=False) as bar:
        for _ in range(rounds):
            for case in cases:
                bar.set_description(case.name)
                found[case].append(train(case, device, steps))
                bar.update()
    return [Measurement(case, steps) for case, steps in found.items()]


# Benchmarks


@dataclass(frozen=True)
class Benchmarks:
    """What one process reaches while the others wait, and seconds of an all-reduce by (size of group, bytes)."""

    matrix_rate: dict[str, float]  # FLOP/s, by dtype
    memory_bandwidth: float  # bytes/s
    launch_seconds: float  # of a kernel that does almost nothing
    all_reduce: dict[tuple[int, int], float]


def benchmark(path: str) -> None:
    """Run on every rank of a group; rank 0 writes what it found. Collective."""
    with process_group() as process:
        alone: dict[str, Any] = {}
        if process.is_main:
            rates = {name: matrix_rate(getattr(torch, name), process.device) for name in DTYPES}
            bandwidth = copy_rate(1 << 28, process.device)  # larger than any cache
            alone = {"rates": rates, "bandwidth": bandwidth, "launch": launch_seconds(process.device)}
        dist.barrier()
        reduced = []
        for size in sorted({2, process.world_size}):
            group = dist.new_group(list(range(size)))
            for nbytes in (8, 1 << 24) if process.rank < size else ():
                reduced.append((size, nbytes, all_reduce_seconds(nbytes, group, process.device)))
            dist.barrier()
        if process.is_main:
            Path(path).write_text(json.dumps(alone | {"all_reduce": reduced}))


def run_benchmarks(processes: int) -> Benchmarks:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        torchrun(max(processes, 1), __file__, "--benchmark", str(path))
        found = json.loads(path.read_text())
    reduced = {(int(size), int(nbytes)): seconds for size, nbytes, seconds in found["all_reduce"]}
    return Benchmarks(found["rates"], found["bandwidth"], found["launch"], reduced)


def seconds_of(work: Callable[[], object], device: torch.device, least: float = 0.2) -> float:
    """The least time of one call: nothing can make it faster than it is, and other programs make it slower."""
    work()
    found: list[float] = []
    end = time.perf_counter() + least
    while len(found) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of large square matrices."""
    size = 8192 if device.type == "cuda" else 768
    left, right = torch.rand(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: left @ right, device)


def copy_rate(nbytes: int, device: torch.device) -> float:
    """Bytes read and written in a second."""
    source = torch.zeros(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_of(lambda: target.copy_(source), device)


def launch_seconds(device: torch.device, kernels: int = 500) -> float:
    """Of a kernel that does almost nothing."""
    x = torch.zeros(8, device=device)

    def chain() -> None:
        for _ in range(kernels):
            x.add_(1)

    return seconds_of(chain, device) / kernels


def all_reduce_seconds(nbytes: int, group: dist.ProcessGroup, device: torch.device, repeats: int = 10) -> float:
    """Of one of several in a row: processes that share cores need turns. Collective."""
    x = torch.zeros(nbytes // 4, device=device)

    def several() -> None:
        for _ in range(repeats):
            dist.all_reduce(x, group=group)
        x.sum().item()  # host sync

    several()
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        several()
        found.append((time.perf_counter() - begin) / repeats)
    return median(found)


# The machine


def describe(found: Benchmarks, device: str) -> Gpu:
    """The machine as its benchmarks have it, with assumed efficiencies: where the fit begins."""
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 0
    if device == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        ranks = torch.cuda.device_count()
    else:
        name, ranks = "cpu", CPU_RANKS
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    gpu = Gpu(name, memory, found.matrix_rate, found.memory_bandwidth, 1e9, 1e9, ranks, cores)
    latency, message, link = messages_of(found.all_reduce, gpu) if found.all_reduce else (2e-5, TINY, 1e9)
    efficiency = Efficiency(
        matrix=0.7,
        memory=0.7,
        link=0.7,
        network=0.7,
        launch_seconds=PYTHON[device] * found.launch_seconds,
        latency_seconds=latency,
        message_seconds=message,
        network_latency_seconds=latency,
    )
    return replace(gpu, link_bandwidth=link, network_bandwidth=link, efficiency=efficiency)


# A kernel of a training takes so many times what it takes in a row, where the fit begins: a model's modules, views and
# gradients are Python and dispatches too. On a GPU they hide behind the kernels before.
PYTHON = {"cpu": 4.0, "cuda": 1.0}
TINY = 1e-9  # seconds: a cost that is not there, but whose logarithm is


def messages_of(all_reduce: Mapping[tuple[int, int], float], gpu: Gpu) -> tuple[float, float, float]:
    """(seconds of a collective, seconds of each of its messages, bytes/s) from all-reduces."""
    smallest, largest = min(nbytes for _, nbytes in all_reduce), max(nbytes for _, nbytes in all_reduce)
    sizes = sorted({size for size, _ in all_reduce})
    # Processes that share cores take turns: what each of them needs is less than what all of them wait.
    mine = {key: seconds / gpu.slowdown(key[0]) for key, seconds in all_reduce.items()}
    few, many = sizes[0], sizes[-1]
    message = TINY
    if many > few:
        more = messages("all-reduce", many)[0] - messages("all-reduce", few)[0]
        message = max((mine[many, smallest] - mine[few, smallest]) / more, TINY)
    count, share = messages("all-reduce", few)
    latency = max(mine[few, smallest] - count * message, TINY)
    link = largest * share / max(mine[few, largest] - mine[few, smallest], TINY)
    return latency, message, link


# Predicting


class Predictor:
    """Plans of some cases on any hardware. What does not depend on the hardware is done once."""

    def __init__(self, cases: Sequence[Case], device: str, gpu: Gpu) -> None:
        self._planners = []
        for case in cases:
            config = load_config(CONFIG, case.overrides(device))
            planner, layout = Planner(gpu), check(config, case.processes)
            with fake_world(0, case.processes):
                planner.plan(config, layout)
            self._planners.append((planner, config, layout))

    def plans(self, gpu: Gpu) -> Iterator[Plan]:
        for planner, config, layout in self._planners:
            planner.gpu = gpu
            yield planner.plan(config, layout)

    def seconds(self, gpu: Gpu) -> NDArray[np.float64]:
        """Of a step, of each case."""
        return np.array([plan.seconds for plan in self.plans(gpu)])


# Fitting

PARTS = ("matrix", "memory", "link")  # of a rate
COSTS = ("launch_seconds", "latency_seconds", "message_seconds")
# The factor by which each number may be wrong where the fit begins, as one standard deviation: of a part's odds (p to
# 1 - p), of a cost itself.
DOUBT = 2.0
NOISE = 0.03  # of a measured time
MOST_TRIES, LEAST_GAIN = 60, 1e-6
SMALL = 1e-4  # step of a slope; a plan's seconds are piecewise linear in every cost


def coordinates(gpu: Gpu) -> NDArray[np.float64]:
    """What the fit changes: logarithms, for there any number is a part between 0 and 1, or a cost above 0."""
    parts = [getattr(gpu.efficiency, name) for name in PARTS]
    costs = [getattr(gpu.efficiency, name) for name in COSTS]
    return np.log([*(part / (1 - part) for part in parts), *costs])


def at_coordinates(gpu: Gpu, x: NDArray[np.float64]) -> Gpu:
    """The opposite of `coordinates`. There is no network here: it is described as the link is."""
    values = dict(zip((*PARTS, *COSTS), np.exp(x).tolist(), strict=True))
    found = {name: value / (1 + value) if name in PARTS else value for name, value in values.items()}
    network = {"network": found["link"], "network_latency_seconds": found["latency_seconds"]}
    return replace(gpu, efficiency=replace(gpu.efficiency, **found, **network))


def fit(
    predict: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    measured: NDArray[np.float64],
    start: NDArray[np.float64],
    doubt: NDArray[np.float64],
    noise: float = NOISE,
) -> NDArray[np.float64]:
    """The x with the least sum of ((x - start) / doubt)^2 and (log(predict(x) / measured) / noise)^2.

    That is the likeliest x where `start` is known up to `doubt`, and times up to a factor of 1 + `noise`. Found by the
    method of Levenberg (1944) and Marquardt (1963): a step of least squares, the shorter the more often it went wrong.
    """

    def misses(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([np.log(predict(x) / measured) / noise, (x - start) / doubt])

    x, now, damping = start, misses(start), 1.0
    for _ in range(MOST_TRIES):
        slopes = np.stack([(misses(x + SMALL * unit) - now) / SMALL for unit in np.eye(len(x))], axis=1)
        rows = np.concatenate([slopes, np.sqrt(damping) * np.diag(1 / doubt)])
        change = np.linalg.lstsq(rows, -np.concatenate([now, np.zeros(len(x))]), rcond=None)[0]
        then = misses(x + change)
        gain = now @ now - then @ then
        if gain > 0:
            x, now, damping = x + change, then, damping / 4
        else:
            damping *= 8
        if 0 <= gain < LEAST_GAIN:
            break
    return x


def calibrated(gpu: Gpu, measured: Sequence[Measurement], device: str) -> Gpu:
    """The GPU with the efficiencies with which plans agree with measurements."""
    predictor = Predictor([one.case for one in measured], device, gpu)
    doubt = np.full(len(PARTS) + len(COSTS), np.log(DOUBT))
    seconds = np.array([one.seconds for one in measured])
    found = fit(lambda x: predictor.seconds(at_coordinates(gpu, x)), seconds, coordinates(gpu), doubt)
    return at_coordinates(gpu, found)


# Judging


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of the places in which two lists of numbers put the same things; equals share their places."""
    places = [[sum(v < w for v in values) + sum(v == w for v in values) / 2 for w in values] for values in (one, other)]
    return float(np.asarray(np.corrcoef(places))[0, 1])


@dataclass(frozen=True)
class Verdict:
    """Predicted and measured seconds of a step of each case."""

    measured: list[Measurement]
    predicted: list[float]

    @property
    def errors(self) -> list[float]:
        """As parts of what was measured; positive where the prediction is too long."""
        return [guess / one.seconds - 1 for guess, one in zip(self.predicted, self.measured, strict=True)]

    @property
    def correlation(self) -> float:
        return spearman(self.predicted, [one.seconds for one in self.measured])

    @property
    def median_error(self) -> float:
        return median(map(abs, self.errors))

    @property
    def holds(self) -> bool:
        return self.correlation >= LEAST_CORRELATION and self.median_error <= MOST_ERROR

    def lines(self) -> Iterator[str]:
        rows = [
            (
                one.case.name,
                str(one.case.processes),
                str(one.case.width),
                f"{guess:.3f}",
                f"{one.seconds:.3f}",
                f"{error:+.0%}",
                f"{one.noise:.0%}",
            )
            for one, guess, error in zip(self.measured, self.predicted, self.errors, strict=True)
        ]
        yield from table(("layout", "processes", "width", "predicted s", "measured s", "error", "noise"), rows)

    def summary(self) -> str:
        return f"rank correlation {self.correlation:.2f}, median error {self.median_error:.0%}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "cases": [
                {
                    **asdict(one.case),
                    "predicted_seconds": guess,
                    "measured_seconds": one.seconds,
                    "error": error,
                    "noise": one.noise,
                    "rounds": one.rounds,
                }
                for one, guess, error in zip(self.measured, self.predicted, self.errors, strict=True)
            ],
            "rank_correlation": self.correlation if len(self.measured) > 1 else None,
            "median_error": self.median_error,
        }


def judge(gpu: Gpu, measured: Sequence[Measurement], device: str) -> Verdict:
    """How far plans are from what was measured."""
    predictor = Predictor([one.case for one in measured], device, gpu)
    return Verdict(list(measured), predictor.seconds(gpu).tolist())


# Main


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.benchmark:
        benchmark(args.benchmark)
        return 0
    try:
        return run(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return BAD_INPUT


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = load_gpu(args.judge) if args.judge else None
    fitted = runnable(MEASURED, device) if args.out else []
    judged = runnable(JUDGED, device) if args.judge is not None else []
    start = describe(run_benchmarks(most_processes(device)), device) if args.out else None
    found = {one.case: one for one in measure([*fitted, *judged], device, args.steps, args.rounds)}
    everything: dict[str, Any] = {"machine": machine(device)}
    if start is not None:
        seen = [found[case] for case in fitted]
        made = calibrated(start, seen, device)
        verdict = judge(made, seen, device)
        args.out.write_text(header(everything["machine"], verdict) + made.to_yaml())
        print("\n".join((*verdict.lines(), f"these gave {args.out}")))
        everything |= {"benchmarks": asdict(start), "calibrated": verdict.to_dict()}
        gpu = gpu or made
    status = 0
    if judged:
        assert gpu is not None
        verdict = judge(gpu, [found[case] for case in judged], device)
        print("\n".join((*verdict.lines(), verdict.summary())))
        everything["judged"] = verdict.to_dict()
        status = 0 if verdict.holds else MISSED
    if args.json:
        assert gpu is not None
        args.json.write_text(json.dumps(everything | {"gpu": asdict(gpu)}, indent=1) + "\n")
    return status


def most_processes(device: str) -> int:
    """Of any training here."""
    most = max(case.processes for case in (*MEASURED, *JUDGED))
    return min(most, torch.cuda.device_count()) if device == "cuda" else most


def runnable(cases: Sequence[Case], device: str) -> list[Case]:
    """The cases for which there are GPUs; says which are left out."""
    most = most_processes(device)
    for case in cases:
        if case.processes > most:
            print(f"calibrate: {case.name} needs {case.processes} GPUs, there are {most}", file=sys.stderr)
    return [case for case in cases if case.processes <= most]


def machine(device: str) -> dict[str, Any]:
    """What it ran on. load: processes that wanted a core just before, which tells a quiet machine."""
    found: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
    found |= {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2), "torch": torch.__version__}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found


def header(found: Mapping[str, Any], verdict: Verdict) -> str:
    """Says in the file where its numbers are from."""
    where = ", ".join(f"{key} {value}" for key, value in found.items())
    lines = ["Measured by tools/calibrate.py.", where, "", *verdict.lines()]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
