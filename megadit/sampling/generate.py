"""Prompts to images with whatever pipeline of ranks holds the network."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megadit.diffusion.guidance import guided
from megadit.diffusion.sampler import SAMPLERS, Progress
from megadit.diffusion.timesteps import sampling_times
from megadit.encoders.condition import Condition
from megadit.parallel.pipeline.schedule import Pipeline
from megadit.runtime.seed import stream

logger = logging.getLogger("megadit")


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn. Heun evaluates the network twice a step, Euler once."""

    sampler: Literal["euler", "heun"] = "heun"
    steps: int = 20
    guidance: float = 3.0  # 1: none
    shift: float = 1.0  # more than 1 spends more steps near the noise; see objective.shift_tokens


def generate(
    pipeline: Pipeline,
    condition: Condition,
    prompts: Sequence[str],
    image_shape: tuple[int, int, int],
    config: SampleConfig,
    seed: int,
    dtype: torch.dtype,
    first_index: int = 0,
    group: int = 1,
    progress: Progress = iter,
) -> Tensor:
    """One image per prompt, [B, C, H, W], on every rank that takes part. Collective over the model's ranks.

    Image i starts from noise that depends on (seed, first_index + i) alone. `dtype`: the network's; images are float32
    at least. `group` images, beginning at a multiple of it, may be routed together: the last group is filled up with
    more images of the last prompt, which are thrown away, so that an image depends on its group's prompts and not on
    how groups are batched.

    Raises ValueError for no prompts, for an empty one (guidance steers away from the empty caption), for one that the
    condition refuses, and for a batch that begins within a group.
    """
    if not prompts:
        raise ValueError("no prompts; say what to draw")
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {first_index + i} is empty; say what to draw")
    if first_index % group:
        raise ValueError(
            f"first_index={first_index} is within a group of {group} images that are routed together; "
            f"begin at a multiple of {group}"
        )
    for warning in condition.warnings(prompts):
        logger.warning("%s", warning)
    device, filling = pipeline.device, -len(prompts) % group
    told = condition.encode([*prompts, *[prompts[-1]] * filling])
    # Conditional and unconditional images never share a group: each half is whole groups.
    both = {key: torch.cat([value, condition.nothing[key].expand_as(value)]) for key, value in told.items()}
    fixed = {"size": tuple(image_shape[1:]), **{key: value.to(device) for key, value in both.items()}}
    exact = torch.promote_types(dtype, torch.float32)  # bf16 would lose the small steps

    def network(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        keywords = {"timesteps_B": timesteps_B, **fixed}
        return pipeline.forward(x_BCHW.to(dtype), keywords, multiple=group).to(exact)

    noise_BCHW = noise_of(seed, range(first_index, first_index + len(prompts) + filling), image_shape)
    times = sampling_times(config.steps, config.shift, exact).to(device)
    velocity = guided(network, config.guidance)
    return SAMPLERS[config.sampler](velocity, noise_BCHW.to(device, exact), times, progress)[: len(prompts)]


def noise_of(seed: int, indices: Iterable[int], image_shape: tuple[int, int, int]) -> Tensor:
    """What images start from, [B, C, H, W]; each image's is a function of the seed and its own index."""
    # In float64: float32 normals differ between CPUs of different vector width.
    return torch.stack(
        [torch.randn(image_shape, generator=stream(seed, "sample", i), dtype=torch.float64) for i in indices]
    )
