"""Captions to images with whatever pipeline of ranks holds the network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megadit.diffusion.guidance import guided
from megadit.diffusion.sampler import SAMPLERS, Progress
from megadit.diffusion.timesteps import sampling_times
from megadit.encoders.tokenizer import Tokenizer
from megadit.parallel.pipeline.schedule import Pipeline
from megadit.runtime.seed import stream

logger = logging.getLogger("megadit")


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn. Heun evaluates the network twice a step, Euler once."""

    sampler: Literal["euler", "heun"] = "heun"
    steps: int = 20
    guidance: float = 3.0  # 1: none
    shift: float = 1.0  # more than 1 spends more steps near the noise


def generate(
    pipeline: Pipeline,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    image_shape: tuple[int, int, int],
    length: int,
    config: SampleConfig,
    seed: int,
    dtype: torch.dtype,
    first_index: int = 0,
    progress: Progress = iter,
) -> Tensor:
    """One image per prompt, [B, C, H, W], on every rank that takes part. Collective over the model's ranks.

    Image i starts from noise that depends on (seed, first_index + i) alone. `length`: tokens of a caption.
    Raises ValueError for no prompts, and for an empty one: the empty caption is what guidance steers away from.
    """
    if not prompts:
        raise ValueError("no prompts; say what to draw")
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {first_index + i} is empty; say what to draw")
    for prompt in tokenizer.too_long(prompts, length):
        logger.warning("the prompt %r is cut to the %d tokens that the model reads", prompt, length)
    device = pipeline.device
    streams = [stream(seed, "sample", first_index + i) for i in range(len(prompts))]
    # In float64: float32 normals differ between CPUs of different vector width.
    noise = [torch.randn(image_shape, generator=generator, dtype=torch.float64) for generator in streams]
    noise_BCHW = torch.stack(noise).to(device, dtype)
    ids_BL, mask_BL = tokenizer.encode([*prompts, *[""] * len(prompts)], length)
    text = {"text_ids_BL": ids_BL.to(device), "text_mask_BL": mask_BL.to(device), "size": tuple(image_shape[1:])}

    def network(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return pipeline.forward(x_BCHW, {"timesteps_B": timesteps_B, **text})

    times = sampling_times(config.steps, config.shift, dtype).to(device)
    return SAMPLERS[config.sampler](guided(network, config.guidance), noise_BCHW, times, progress)
