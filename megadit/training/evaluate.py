"""The held-out split's loss and pictures along the way, both with the averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megadit.diffusion.objective import velocity_loss
from megadit.sampling.generate import generate
from megadit.training.build import Run
from megadit.training.config import images_per_group, sampling_of
from megadit.training.step import prepare


@torch.no_grad()
def heldout_loss(run: Run) -> float:
    """Mean loss over the held-out split; noise, times and captions are the same at every call. Collective."""
    total = torch.zeros(2, dtype=torch.float64, device=run.process.device)
    with run.ema.swapped_in():
        for batch, weight_B in run.heldout_loader.heldout():
            noisy_BCHW, target_BCHW, keywords = prepare(run, batch, step=0, caption_dropout=0.0)
            prediction_BCHW = run.pipeline.forward(noisy_BCHW, keywords, run.pipeline.num_microbatches)
            weight_B = weight_B.to(total)
            total += torch.stack([(velocity_loss(prediction_BCHW, target_BCHW) * weight_B).sum(), weight_B.sum()])
    loss, count = run.grid["dp"].all_reduce(total).tolist()
    return loss / count


@torch.no_grad()
def sample_pictures(run: Run) -> Tensor:
    """`log.samples` images of the held-out split's prompts, [N, C, H, W]; the noise is the same at every call.

    Collective; every data-parallel rank draws the same ones.
    """
    with run.ema.swapped_in():
        return generate(
            run.pipeline,
            run.inputs.condition,
            run.inputs.prompts(run.config.log.samples),
            run.image_shape,
            sampling_of(run.config, run.config.sample, run.image_shape[1:]),
            run.config.run.seed,
            run.config.dtype,
            group=images_per_group(run.config),
        )
