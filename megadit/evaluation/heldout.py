"""The held-out loss by time: where between image and noise a network predicts the velocity well.

Every held-out image is seen once in every bin of times. In pass p image i has a time in bin (i + p) mod bins, so that
images that are routed together have times as different as in training. Noise and times are functions of the seed, the
pass and the image alone: the same for every run, layout and call.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadit.data.batch import Batch
from megadit.diffusion.config import ObjectiveConfig
from megadit.diffusion.objective import corrupt, velocity_loss
from megadit.evaluation.defaults import BINS
from megadit.evaluation.heldout_split import Share
from megadit.runtime.agreement import gathered, together
from megadit.runtime.seed import stream
from megadit.sampling.folder import writing
from megadit.training.restore import Sampler


@dataclass(frozen=True)
class Bin:
    """Times from `begin` to `end`; 0 is the image, 1 the noise.

    loss: mean over `count` images; error: its standard error; trained: the fraction of a training's times that are in
    the bin (without shift_tokens).
    """

    begin: float
    end: float
    loss: float
    error: float
    count: int
    trained: float


def noised(batch: Batch, seed: int, number: int, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy images, target velocity, times) of a batch in pass `number`, float64."""
    noise_BCHW = torch.empty_like(batch.latents_BCHW, dtype=torch.float64)
    times_B = torch.empty(len(batch), dtype=torch.float64)
    for i, sample in enumerate(batch.sample_ids_B.tolist()):
        generator = stream(seed, "heldout", number, sample)
        noise_BCHW[i].normal_(generator=generator)
        times_B[i] = (bin_of(sample, number, bins) + torch.rand((), dtype=torch.float64, generator=generator)) / bins
    return *corrupt(batch.latents_BCHW.double(), noise_BCHW, times_B), times_B


def bin_of(sample: int, number: int, bins: int) -> int:
    """The bin of an image's time in pass `number`.

    >>> [[bin_of(sample, number, bins=3) for sample in range(4)] for number in range(3)]
    [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]
    """
    return (sample + number) % bins


@torch.no_grad()
def losses_by_bin(
    sampler: Sampler,
    share: Share,
    bins: int = BINS,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> np.ndarray:
    """Every image's loss in every bin, [bins, images], float64, in the order of the split; with the average weights.

    Collective; on every rank the same. `progress` shows the passes.
    """
    losses = np.full((bins, share.total), np.nan)
    for number in progress(range(bins)):
        found: list[tuple[int, int, float]] = []
        for batch, weight_B in read_together(share):
            loss_B = _losses(sampler, batch, seed, number, bins)
            for sample, weight, loss in zip(batch.sample_ids_B.tolist(), weight_B, loss_B.tolist(), strict=True):
                if weight:
                    found.append((bin_of(sample, number, bins), sample, loss))
        for part in gathered(found if sampler.writes else []):
            for row, sample, loss in part:
                losses[row, sample] = loss
    return losses


def check_finite(losses: np.ndarray, checkpoint: str) -> None:
    """Raises ValueError naming the checkpoint whose losses are not finite, and the first image."""
    _, images = np.nonzero(~np.isfinite(losses))
    if len(images):
        raise ValueError(
            f"{checkpoint}: the held-out loss is not finite, of image {images.min()} for one; judge a checkpoint from "
            "before the training diverged, or, if the network overflows in a lower precision, set run.dtype: float32 "
            "in the run's config.yaml"
        )


def read_together(share: Share) -> Iterator[tuple[Batch, Tensor]]:
    """This rank's batches. Collective: all ranks raise the ValueError of one that cannot read its own."""
    batches = share.batches()
    for _ in range(share.count):
        with together():
            item = next(batches)
        yield item


def _losses(sampler: Sampler, batch: Batch, seed: int, number: int, bins: int) -> Tensor:
    """Each sample's, [B]."""
    config, device = sampler.config, sampler.pipeline.device
    exact = torch.promote_types(config.dtype, torch.float32)  # bf16 would blur the times and the target
    noisy_BCHW, target_BCHW, times_B = noised(batch, seed, number, bins)
    keywords: dict[str, object] = {
        "timesteps_B": times_B.to(device, exact),
        "size": tuple(batch.latents_BCHW.shape[2:]),
    }
    for key, told in batch.condition.items():
        keywords[key] = told.to(device, config.dtype if told.is_floating_point() else told.dtype)
    prediction = sampler.pipeline.forward(noisy_BCHW.to(device, config.dtype), keywords, multiple=sampler.group)
    return velocity_loss(prediction, target_BCHW.to(device, exact)).double().cpu()


def summarise(losses: np.ndarray, objective: ObjectiveConfig) -> list[Bin]:
    """Means and standard errors of `losses_by_bin`."""
    bins, count = losses.shape
    edges = np.linspace(0, 1, bins + 1).tolist()
    below = [times_below(edge, objective) for edge in edges]
    errors = losses.std(axis=1, ddof=1) / math.sqrt(count) if count > 1 else np.full(bins, np.nan)
    return [
        Bin(edges[b], edges[b + 1], float(losses[b].mean()), float(errors[b]), count, below[b + 1] - below[b])
        for b in range(bins)
    ]


def times_below(t: float, objective: ObjectiveConfig) -> float:
    """The fraction of a training's times that are below t: logit-normal, then shifted.

    >>> times_below(0.5, ObjectiveConfig()), times_below(0.75, ObjectiveConfig(shift=3.0))
    (0.5, 0.5)
    """
    if t <= 0 or t >= 1:
        return float(t >= 1)
    before = t / (objective.shift - (objective.shift - 1) * t)  # what shift_time made t of
    logit = math.log(before / (1 - before))
    if not objective.logit_std:  # all times are one
        return float(logit > objective.logit_mean)
    normal = (logit - objective.logit_mean) / objective.logit_std
    return 0.5 * (1 + math.erf(normal / math.sqrt(2)))


def totals(bins: Sequence[Bin]) -> dict[str, float]:
    """The mean loss over all times alike, and that with times as often as in training."""
    return {
        "loss_uniform": sum(one.loss for one in bins) / len(bins),
        "loss_as_trained": sum(one.loss * one.trained for one in bins),
    }


def to_dict(bins: Sequence[Bin]) -> dict[str, Any]:
    """For JSON, which knows no NaN: the standard error of one image is None."""
    errors = [one.error if one.count > 1 else None for one in bins]
    return {"bins": [asdict(one) | {"error": error} for one, error in zip(bins, errors, strict=True)], **totals(bins)}


def table(bins: Sequence[Bin]) -> list[str]:
    """For people; the last line has the means."""
    rows = [f"{'t':>11}  {'loss':>9}  {'std. error':>10}  {'images':>7}  {'trained':>7}"]
    rows += [
        f"{one.begin:4.2f} - {one.end:4.2f}  {one.loss:9.5f}  {one.error:10.5f}  {one.count:7d}  {one.trained:7.1%}"
        for one in bins
    ]
    means = totals(bins)
    return [
        *rows,
        f"held-out loss over all times alike: {means['loss_uniform']:.6f}; "
        f"with times as trained: {means['loss_as_trained']:.6f}",
    ]


def check_plots() -> None:
    """Raises ValueError where what plots is not installed: before there is something to plot, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the plot needs matplotlib: pip install -e '.[plots]', or leave --plot out")


def save_plot(bins: Sequence[Bin], path: Path, title: str) -> None:
    """A PNG: the loss of each bin with two standard errors. Raises ValueError naming a file that cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    middles = [(one.begin + one.end) / 2 for one in bins]
    axes.errorbar(
        middles, [one.loss for one in bins], [2 * one.error for one in bins], fmt="o-", markersize=4, capsize=3
    )
    axes.set(xlabel="time t (0: image, 1: noise)", ylabel="held-out velocity loss", title=title, xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
