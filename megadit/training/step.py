"""One training step: the only place where data, objective, model and optimizer meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadit.data.batch import Batch
from megadit.diffusion.objective import corrupt
from megadit.diffusion.timesteps import logit_normal
from megadit.runtime.seed import stream
from megadit.training.build import Run
from megadit.training.lr import learning_rate


@dataclass(frozen=True)
class StepReport:
    """What a step did, on every rank alike; reading it waits for the device.

    loss: mean over the global batch. grad_norm: before clipping. routing: per mixture-of-experts layer, means over
    the ranks for the step's last microbatch.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    routing: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Draws:
    """Everything random about a batch; each sample's part is a function of (seed, step, sample id)."""

    noise_BCHW: Tensor
    normal_B: Tensor  # becomes the time
    uniform_B: Tensor  # below objective.caption_dropout: the caption is dropped


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


def prepare(run: Run, batch: Batch, step: int, caption_dropout: float) -> tuple[Tensor, Tensor, dict[str, object]]:
    """(noisy images, target velocity, keyword arguments) of a batch, on the device and in the run's precision."""
    config, device = run.config, run.process.device
    draws = draw(config.run.seed, step, batch)
    objective = config.objective
    timesteps_B = logit_normal(draws.normal_B, objective.logit_mean, objective.logit_std, objective.shift)
    noisy_BCHW, target_BCHW = corrupt(batch.latents_BCHW, draws.noise_BCHW, timesteps_B)
    dropped_B1 = (draws.uniform_B < caption_dropout)[:, None]
    empty_ids_1L, empty_mask_1L = run.inputs.tokenizer.encode([""], config.text.length)
    keywords: dict[str, object] = {
        "timesteps_B": timesteps_B.to(device, config.dtype),
        "text_ids_BL": torch.where(dropped_B1, empty_ids_1L, batch.text_ids_BL).to(device),
        "text_mask_BL": torch.where(dropped_B1, empty_mask_1L, batch.text_mask_BL).to(device),
        "size": tuple(batch.latents_BCHW.shape[2:]),
    }
    return noisy_BCHW.to(device, config.dtype), target_BCHW.to(device, config.dtype), keywords


def train_step(run: Run, step: int) -> StepReport:
    """Step `step` (from 1): a function of the parameters, the optimizer's state, run.seed and the step's number."""
    noisy_BCHW, target_BCHW, keywords = prepare(run, run.loader.batch(step), step, run.config.objective.caption_dropout)
    loss = run.pipeline.train(noisy_BCHW, target_BCHW, keywords)
    run.engine.reduce_gradients()
    lr = learning_rate(run.config.optim, step, run.config.run.steps)
    grad_norm = run.engine.step(lr)
    run.ema.update(step)
    return report(run, step, loss, grad_norm, lr)


ROUTING = ("unpicked", "busiest", "entropy")


def report(run: Run, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> StepReport:
    """Average over the ranks, in one all-reduce of one small vector, and read it: the host waits here."""
    moe_layers = [layer for layer in range(run.config.model.layers) if run.config.model.is_moe(layer)]
    values = torch.zeros(1 + len(ROUTING) * len(moe_layers), dtype=loss.dtype, device=loss.device)
    values[0] = loss
    for layer, stats in run.model.router_stats().items():
        begin = 1 + len(ROUTING) * moe_layers.index(layer)
        values[begin : begin + len(ROUTING)] = torch.stack([getattr(stats, key) for key in ROUTING])
    # A stage fills in its own part only; the replicas along dp and tp are averaged.
    averaged = run.grid["world"].all_reduce(values) / (run.grid["dp"].size * run.grid["tp"].size)
    norm, mean_loss, *routing = torch.cat([grad_norm.view(1).to(averaged), averaged]).tolist()  # host sync
    return StepReport(
        step=step,
        loss=mean_loss,
        grad_norm=norm,
        lr=lr,
        routing={
            layer: dict(zip(ROUTING, routing[i * len(ROUTING) :], strict=False)) for i, layer in enumerate(moe_layers)
        },
    )
