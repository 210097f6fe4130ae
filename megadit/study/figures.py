"""Figures of a study: curves of the loss, and measures with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megadit.study.summary import HELDOUT_LOSS, SCORE, SCORE_HELDOUT, Variant

COLOURS = ("#2a78d6", "#d9562b", "#3a9b56", "#8b5cc7", "#b8860b", "#c2378b")


class Figure(NamedTuple):
    """What draws a figure to a path, and what it shows, in words."""

    draw: Callable[[Sequence[Variant], Path], None]
    caption: str


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(variants: Sequence[Variant], path: Path) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for i, variant in enumerate(variants):
        colour = COLOURS[i % len(COLOURS)]
        steps, losses = curves_of(variant)
        axes.plot(steps, losses.mean(axis=0), color=colour, label=variant.label, marker="o", markersize=3)
        axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="held-out velocity loss, averaged weights", yscale="log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")  # within a decade a logarithmic axis would have hardly a number
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves_of(variant: Variant) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float64]]]:
    """Steps at which every seed has a finite held-out loss, and the losses [seed, step]: a run that is stopped at such
    a step goes on without that look.
    """
    looks = [{step: loss for step, loss in record["heldout_curve"] if loss is not None} for record in variant.records]
    steps = sorted(set.intersection(*map(set, looks)))
    return steps, np.array([[look[step] for step in steps] for look in looks])


def draw_measures(variants: Sequence[Variant], path: Path) -> None:
    plt = _pyplot()
    measures = (HELDOUT_LOSS, SCORE, SCORE_HELDOUT)
    height = 1.2 + 0.42 * len(variants)
    figure, panels = plt.subplots(1, len(measures), figsize=(11, height), sharey=True, constrained_layout=True)
    for axes, measure in zip(panels, measures, strict=True):
        for i, variant in enumerate(variants):
            found = variant.interval(measure)
            if found is None:
                continue
            colour = COLOURS[i % len(COLOURS)] if len(variants) <= len(COLOURS) else COLOURS[i > 0]
            half = found.half * measure.scale
            axes.errorbar(found.mean * measure.scale, i, xerr=half, color=colour, marker="o", capsize=4)
            values = [measure.of(record) for record in variant.records]
            axes.plot(
                [v * measure.scale for v in values if v is not None], [i] * len(values), "|", color=colour, alpha=0.6
            )
        axes.set(xlabel=measure.name)
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(variants)), [variant.label for variant in variants])
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


FIGURES = {
    "curves": Figure(draw_curves, "held-out loss of each variant over the steps, mean and range over the seeds"),
    "measures": Figure(
        draw_measures, "held-out loss and scores of each variant: means of the seeds with 95 % intervals, and each seed"
    ),
}
