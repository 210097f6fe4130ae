"""Train and judge the quickstart's models with several seeds and layouts, and print the ranges of what came out.

    python tools/quickstart_seeds.py            # runs what has no record yet, then prints the table
    python tools/quickstart_seeds.py --table    # prints the table of the records that are there

Each run leaves one small record in docs/results/quickstart. Stopped or killed, the same command goes on: finished runs
are not repeated, and a training goes on from its last checkpoint in runs/seeds. Runs are on the CPU, one after another,
with one thread for each process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megadit
from megadit.runtime.disk import replace_file
from megadit.study.design import fingerprint
from megadit.study.hardware import cores, cpu_name
from megadit.training.config import CONFIG_FILE, RunConfig, load_config
from megadit.training.metrics import METRICS_FILE, read_metrics

RECORDS = Path("docs/results/quickstart")
RUNS = Path("runs/seeds")
FOUR = ("parallel.tensor=2", "parallel.expert=2")  # as in quickstart.sh
THREADS = 1  # of each process

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone: one row of the table."""

    name: str
    label: str
    config: str
    processes: int
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]

    def run_config(self, seed: int) -> RunConfig:
        return load_config(self.config, [*self.overrides, f"run.seed={seed}"])


MIXTURE, DENSE = "examples/configs/digits.yaml", "examples/configs/digits_dense.yaml"
GROUPS = (
    Group("experts_4", "experts, four processes (tensor 2 x expert 2)", MIXTURE, 4, FOUR, (0, 1, 2, 3, 4)),
    Group("experts_1", "experts, one process", MIXTURE, 1, (), (0, 1, 2, 3, 4)),
    Group("dense_4", "dense twin, four processes (tensor 2 x data 2)", DENSE, 4, FOUR[:1], (0, 1, 2)),
)


def record_path(records: Path, group: Group, seed: int) -> Path:
    return records / f"{group.name}_seed{seed}.json"


def read_record(path: Path, config: RunConfig) -> Record:
    """Raises ValueError for a record of another configuration, and for a file that is no record."""
    try:
        record: Record = json.loads(path.read_text())
        same = record["fingerprint"] == fingerprint(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of a run ({error!r}); remove it to run again") from error
    if not same:
        raise ValueError(f"{path} is of another configuration than today's; remove it to run again")
    return record


def train_and_judge(group: Group, seed: int, run: Path) -> float:
    """Returns the CPU seconds of both commands. Raises CalledProcessError when one fails."""
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(THREADS)
    }  # fmt: skip
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(group.processes)]
    launcher = several if group.processes > 1 else []
    train = ["-m", "megadit.train", "--config", group.config, *group.overrides, f"run.seed={seed}", f"run.dir={run}"]
    before = cpu_seconds()
    for command in ([*launcher, *train], ["tools/judge_digits.py", str(run)]):
        subprocess.run([sys.executable, *command], env=environment, stdout=sys.stderr, check=True)
    return cpu_seconds() - before


def cpu_seconds() -> float:
    """CPU time of the child processes that have ended: unlike wall time, it changes little with other load."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def record_of(group: Group, seed: int, run: Path, seconds: float | None) -> Record:
    """What is kept of a run that was trained and judged in this folder. seconds: the CPU time of both, if known."""
    from megadit.study.record import course_of, size  # imports torch

    config = load_config(run / CONFIG_FILE)
    return {
        "config": group.config,
        "processes": group.processes,
        "overrides": list(group.overrides),
        "seed": seed,
        "fingerprint": fingerprint(config),
        **size(config),
        **course_of(read_metrics(run / METRICS_FILE), config),
        "cpu_seconds": seconds,
        "judge": json.loads((run / "result.json").read_text()),
        "machine": {"cpu": cpu_name(), "cores": cores(), "threads_per_process": THREADS},
        "versions": {
            "megadit": megadit.__version__,
            "torch": importlib.metadata.version("torch"),
            "deepspeed": importlib.metadata.version("deepspeed"),
            "python": platform.python_version(),
        },
    }


def conduct(groups: Iterable[Group], seeds: Sequence[int], runs: Path, records: Path) -> None:
    """Run what has no record. Raises ValueError before anything is trained for a record of another configuration."""
    wanted = [
        (group, seed, record_path(records, group, seed)) for group in groups for seed in group.seeds if seed in seeds
    ]
    for group, seed, path in wanted:
        if path.exists():
            read_record(path, group.run_config(seed))
    records.mkdir(parents=True, exist_ok=True)
    for number, (group, seed, path) in enumerate(wanted, 1):
        if path.exists():
            continue
        run = runs / path.stem
        print(f"run {number} of {len(wanted)}: {group.label}, seed {seed}, in {run}", file=sys.stderr)
        was_begun = run.exists()  # then the first part's CPU time is not known
        seconds = train_and_judge(group, seed, run)
        text = json.dumps(record_of(group, seed, run, None if was_begun else seconds), indent=1) + "\n"
        replace_file(path, text.encode())


# A column's heading, a record's value, and how it is printed.
COLUMNS: tuple[tuple[str, Callable[[Record], float | None], str], ...] = (
    ("read as prompted", lambda record: record["judge"]["read_as_prompted"], ".3f"),
    ("distance ratio", lambda record: record["judge"]["distance_ratio"], ".2f"),
    ("held-out loss", lambda record: record["heldout_loss"], ".3f"),
    ("CPU seconds", lambda record: record["cpu_seconds"], ".0f"),
)


def value_range(values: Iterable[float | None], form: str) -> str:
    """The least and the largest of the values that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return "unknown"
    low, high = (f"{value:{form}}" for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def table(records: Path, groups: Iterable[Group] = GROUPS) -> str:
    """A Markdown table: for each group the least and the largest value over its seeds."""
    headings = ["", "seeds", *(heading for heading, _, _ in COLUMNS)]
    rows = [headings, ["---"] * len(headings)]
    for group in groups:
        seeds = [seed for seed in group.seeds if record_path(records, group, seed).exists()]
        if not seeds:
            continue
        found = [read_record(record_path(records, group, seed), group.run_config(seed)) for seed in seeds]
        ranges = [value_range((value(record) for record in found), form) for _, value, form in COLUMNS]
        rows.append([group.label, ", ".join(map(str, seeds)), *ranges])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [group.name for group in GROUPS]
    parser.add_argument("--groups", nargs="+", choices=names, default=names, help="rows to run (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what is there")
    args = parser.parse_args()
    try:
        if not args.table:
            chosen = [group for group in GROUPS if group.name in args.groups]
            conduct(chosen, args.seeds, RUNS, RECORDS)
        print(table(RECORDS), end="")
    except (ValueError, OSError) as error:
        print(f"quickstart_seeds: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"quickstart_seeds: a run ended with status {error.returncode}; start again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart_seeds: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
