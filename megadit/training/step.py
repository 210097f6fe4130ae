"""One training step: the only place where data, objective, model and optimizer meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megadit.data.batch import Batch
from megadit.diffusion.config import kept_tokens, shift_of
from megadit.diffusion.objective import corrupt
from megadit.diffusion.timesteps import logit_normal
from megadit.model.embed import kept, patchify
from megadit.runtime.agreement import gathered
from megadit.runtime.seed import stream
from megadit.training.build import Run
from megadit.training.config import training_tokens
from megadit.training.lr import learning_rate
from megadit.training.progress import Progress


@dataclass(frozen=True)
class StepReport:
    """What a step did, on every rank alike.

    loss: mean over the global batch of what is minimised, a balance loss included. grad_norm: before clipping.
    skipped: the loss or the norm was not finite, and nothing has changed.
    routing: statistics of each mixture-of-experts layer by name (see `RouterStats`), means over the global batch.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    routing: dict[int, dict[str, float | list[float]]]


@dataclass(frozen=True)
class Unread:
    """A step's report as it lies on the device. Reading it waits for the step, so the loop reads several at once."""

    step: int
    lr: float
    values: Tensor  # the gradient's norm, the loss, then for each mixture-of-experts layer its statistics
    skipped: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the host knows at once of a step; but for `sample_ids` on every rank alike."""

    unread: Unread
    progress: Progress
    stops: bool  # a rank wishes to stop
    loss: float  # the mean over the global batch
    grad_norm: float
    sample_ids: list[int]  # of this rank
    tokens: int  # that the network saw of each image
    spoilers: list[Spoiler]  # of a step that was skipped: whose numbers are not finite


class Spoiler(NamedTuple):
    """A rank whose own loss or gradient was not finite, before any sum over ranks."""

    rank: int
    sample_ids: list[int]


@dataclass(frozen=True)
class Draws:
    """Everything random about a batch; each sample's part is a function of (seed, step, sample id)."""

    noise_BCHW: Tensor
    normal_B: Tensor  # becomes the time
    uniform_B: Tensor  # below objective.caption_dropout: the caption or class is dropped


def draw(seed: int, step: int, batch: Batch) -> Draws:
    """Draw for each sample from a stream of its own, so that no layout changes what a sample sees."""
    # In float64: float32 normals differ between CPUs of different vector width.
    noise = torch.empty_like(batch.latents_BCHW, dtype=torch.float64)
    normal, uniform = torch.empty(2, len(batch), dtype=torch.float64)
    for i, sample in enumerate(batch.sample_ids_B.tolist()):
        generator = stream(seed, "draw", step, sample)
        noise[i].normal_(generator=generator)
        normal[i].normal_(generator=generator)
        uniform[i].uniform_(generator=generator)
    return Draws(noise, normal, uniform)


def draw_kept(seed: int, step: int, sample_ids: Sequence[int], tokens: int, count: int) -> Tensor:
    """The places of the tokens that the network sees of each sample, [B, count], in order; each from its own stream."""
    return torch.stack(
        [
            torch.randperm(tokens, generator=stream(seed, "keep", step, sample))[:count].sort().values
            for sample in sample_ids
        ]
    )


def prepare(
    run: Run, batch: Batch, step: int, caption_dropout: float, keep_tokens: float = 1.0
) -> tuple[Tensor, Tensor, dict[str, object]]:
    """(noisy images, target velocity, keyword arguments) of a batch, on the device; the images in the run's dtype.

    With `keep_tokens` less than 1 the network sees this fraction of an image's tokens, and the target is that of their
    patches.
    """
    config, device = run.config, run.process.device
    exact = torch.promote_types(config.dtype, torch.float32)  # bf16 would blur the times and the target
    draws = draw(config.run.seed, step, batch)
    objective, (height, width) = config.objective, batch.latents_BCHW.shape[2:]
    tokens = config.model.tokens_of((height, width))
    shift = shift_of(objective.shift, tokens, objective.shift_tokens)
    timesteps_B = logit_normal(draws.normal_B, objective.logit_mean, objective.logit_std, shift)
    noisy_BCHW, target = corrupt(batch.latents_BCHW, draws.noise_BCHW, timesteps_B)
    keywords: dict[str, object] = {
        "timesteps_B": timesteps_B.to(device, exact),
        "size": (height, width),
    }
    count = kept_tokens(tokens, keep_tokens)
    if count < tokens:
        kept_BT = draw_kept(config.run.seed, step, batch.sample_ids_B.tolist(), tokens, count)
        target = kept(patchify(target, config.model.patch), kept_BT)
        keywords["kept_BT"] = kept_BT.to(device)
    dropped_B = draws.uniform_B < caption_dropout
    for key, told in batch.condition.items():
        dropped = dropped_B.view(-1, *[1] * (told.ndim - 1))
        shown = torch.where(dropped, run.inputs.condition.nothing[key], told)
        keywords[key] = shown.to(device, config.dtype if shown.is_floating_point() else shown.dtype)
    return noisy_BCHW.to(device, config.dtype), target.to(device, exact), keywords


def train_step(run: Run, progress: Progress, stop: bool = False) -> Outcome:
    """The step after `progress`: a function of the parameters, the optimizer's state, run.seed and `progress`.

    `stop`: whether this rank wishes to; all learn of it.
    """
    step, batch = progress.step + 1, run.loader.batch(progress.batch + 1)
    objective, (height, width) = run.config.objective, batch.latents_BCHW.shape[2:]
    dropout, keep_tokens = objective.caption_dropout, objective.keep_tokens
    noisy_BCHW, target, keywords = prepare(run, batch, progress.batch + 1, dropout, keep_tokens)
    loss = run.pipeline.train(noisy_BCHW, target, keywords)
    run.engine.reduce_gradients()
    lr = learning_rate(run.config.optim, step, run.config.run.steps)
    update = run.engine.step(lr, loss, told=float(stop))
    sample_ids = batch.sample_ids_B.tolist()
    if update.applied:
        run.ema.update(step)
    return Outcome(
        unread=Unread(step, lr, averaged(run, loss, update.norm), skipped=not update.applied),
        progress=progress.after(update.applied, run.config.guard.window),
        stops=update.told > 0,
        loss=update.loss / (run.grid["dp"].size * run.grid["tp"].size),
        grad_norm=update.grad_norm,
        sample_ids=sample_ids,
        tokens=training_tokens(run.config, (height, width)),
        spoilers=[] if update.applied else spoilers(run, loss, sample_ids),
    )


def spoilers(run: Run, loss: Tensor, sample_ids: list[int]) -> list[Spoiler]:
    """The ranks that brought numbers that are not finite. Collective."""
    is_sound = run.engine.is_sound and math.isfinite(float(loss))
    found = gathered(None if is_sound else Spoiler(run.process.rank, sample_ids), run.grid["world"].handle)
    return [spoiler for spoiler in found if spoiler is not None]


SCALARS = ("picks", "unpicked", "busiest", "entropy")  # of `RouterStats`


def averaged(run: Run, loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Norm, loss and routing statistics, averaged over the ranks in one all-reduce of one small vector."""
    model = run.config.model
    moe_layers = [layer for layer in range(model.layers) if model.is_moe(layer)]
    length = len(SCALARS) + model.experts
    values = torch.zeros(1 + length * len(moe_layers), dtype=loss.dtype, device=loss.device)
    values[0] = loss
    for stage in run.stages:
        for layer, stats in stage.take_stats(run.pipeline.num_microbatches).items():
            begin = 1 + length * moe_layers.index(layer)
            scalars = torch.stack([getattr(stats, key) for key in SCALARS])
            values[begin : begin + length] = torch.cat([scalars, stats.load_E])
    # A stage fills in its own part only; the replicas along dp and tp are averaged.
    values = run.grid["world"].all_reduce(values) / (run.grid["dp"].size * run.grid["tp"].size)
    return torch.cat([grad_norm.view(1).to(values), values])


def read(run: Run, unread: Sequence[Unread]) -> list[StepReport]:
    """The reports of several steps; the host waits here for the last of them."""
    model = run.config.model
    moe_layers = [layer for layer in range(model.layers) if model.is_moe(layer)]
    rows = torch.stack([report.values for report in unread]).tolist() if unread else []  # host sync
    reports = []
    for report, (grad_norm, loss, *rest) in zip(unread, rows, strict=True):
        routing: dict[int, dict[str, float | list[float]]] = {}
        for layer in moe_layers:
            scalars, load, rest = (
                rest[: len(SCALARS)],
                rest[len(SCALARS) :][: model.experts],
                rest[len(SCALARS) + model.experts :],
            )
            routing[layer] = dict(zip(SCALARS, scalars, strict=True))
            if model.routing == "token_choice":  # expert choice loads all experts alike
                routing[layer]["load"] = load
        reports.append(StepReport(report.step, loss, grad_norm, report.lr, report.skipped, routing))
    return reports
