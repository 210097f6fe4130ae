"""Loss curves of one or several runs in one figure, from their metrics.jsonl.

python tools/plot_loss.py runs/digits runs/digits_dense --out loss.png
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megadit.runtime.tool import refuse_early
from megadit.training.metrics import METRICS_FILE, read_metrics


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    parser.add_argument("--window", type=int, default=50, help="steps of the running mean (default: %(default)s)")
    args = parser.parse_args()
    if args.window < 1:
        parser.error(f"--window {args.window} is not more than 0")
    return args


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics. Raises ValueError naming a file that cannot be read."""
    try:
        return read_metrics(run / METRICS_FILE)
    except OSError as error:
        raise ValueError(f"{run / METRICS_FILE}: {error.strerror}") from error


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("plot_loss", lambda: [read(run) for run in arguments().runs])

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` steps, shorter at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(0, end - window)
    return (sums[end] - sums[begin]) / (end - begin)


def main() -> int:
    args = arguments()
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for i, run in enumerate(args.runs):
        colour = f"C{i}"
        try:
            lines = read(run)
        except ValueError as error:
            print(f"plot_loss: {error}", file=sys.stderr)
            return 2
        steps, loss = (np.array([line[key] for line in lines]) for key in ("step", "loss"))
        axes.plot(steps, loss, color=colour, alpha=0.15, linewidth=0.6)
        axes.plot(steps, smooth(loss, args.window), color=colour, label=f"{run.name}: training")
        heldout = [(line["step"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]
        if heldout:
            label = f"{run.name}: held out (EMA)"
            axes.plot(*zip(*heldout, strict=True), "o--", color=colour, markersize=4, label=label)
    axes.set(xlabel="step", ylabel="velocity loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(args.out, dpi=120)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
