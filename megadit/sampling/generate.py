"""Prompts to images with whatever pipeline of ranks holds the network."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megadit.diffusion.guidance import Guidance, guided
from megadit.diffusion.sampler import Network, OnStep, Progress, after, go_on
from megadit.diffusion.timesteps import sampling_times
from megadit.encoders.condition import Condition
from megadit.runtime.seed import stream
from megadit.sampling.config import SampleConfig
from megadit.sampling.prompts import check_prompts
from megadit.sampling.solvers import SAMPLERS

logger = logging.getLogger("megadit")

NAMED = 5  # pictures at fault that a message names


class NotFinite(ValueError):
    """Pictures that hold infinities, or what is no number."""


class Forward(Protocol):
    """What holds the network: a pipeline of ranks, or the whole network on one device."""

    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: Tensor, keywords: dict[str, Any], *, multiple: int) -> Tensor:
        """The velocity of a batch; a `multiple` of images is routed together."""


def generate(
    pipeline: Forward,
    condition: Condition,
    prompts: Sequence[str],
    image_shape: tuple[int, int, int],
    config: SampleConfig,
    seed: int,
    dtype: torch.dtype,
    first_index: int = 0,
    group: int = 1,
    progress: Progress = iter,
    *,
    latents: Tensor | None = None,
    negative: Sequence[str] | None = None,
    on_step: OnStep = go_on,
) -> Tensor:
    """One image per prompt, [B, C, H, W], on every rank that takes part. Collective over the model's ranks.

    Image i starts from noise that depends on (seed, first_index + i) alone, or from `latents` [B, C, H, W]. `dtype`:
    the network's; images are float32 at least. `negative`: for each prompt what guidance steers away from instead of
    nothing; an empty one is nothing. `on_step` is called after each step, on every rank, with the images so far, and
    may return others.

    `group` images, beginning at a multiple of it, may be routed together: the last group is filled up with
    more images of the last prompt, which are thrown away, so that an image depends on its group's prompts and not on
    how groups are batched.

    Raises ValueError for no prompts, for an empty one (guidance steers away from the empty caption), for one that the
    condition refuses, for a batch that begins within a group, and for latents of another shape; NotFinite for images
    that are not finite.
    """
    check_prompts(prompts, first_index)
    check_begins_a_group(first_index, group)
    if negative is not None and len(negative) != len(prompts):
        raise ValueError(f"{len(negative)} negative prompts for {len(prompts)} images; give one for each")
    for warning in condition.warnings([*prompts, *(negative or [])]):
        logger.warning("%s", warning)
    device, count, filling = pipeline.device, len(prompts), -len(prompts) % group
    exact = torch.promote_types(dtype, torch.float32)  # bf16 would lose the small steps
    told = condition.encode(filled(prompts, filling))
    untold = steered_from(condition, told, filled(negative, filling) if negative else None)
    size = tuple(image_shape[1:])

    def network_told(keywords: dict[str, Tensor]) -> Network:
        fixed = {"size": size, **{key: value.to(device) for key, value in keywords.items()}}

        def network(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
            given = {"timesteps_B": timesteps_B.to(device), **fixed}
            return pipeline.forward(x_BCHW.to(dtype), given, multiple=group).to(exact)

        return network

    # Conditional and unconditional images never share a group: each half is whole groups.
    both = {key: torch.cat([value, untold[key]]) for key, value in told.items()}
    guidance = Guidance(config.guidance, config.guidance_rescale, config.guidance_from, config.guidance_until)
    velocity = guided(network_told(told), network_told(both), guidance)
    start_BCHW = start_of(latents, seed, first_index, count, filling, image_shape)
    times = sampling_times(config.steps, config.shift, exact)  # on the CPU, where guidance looks at them
    watch = Watch(on_step, count)
    images_BCHW = SAMPLERS[config.sampler](velocity, start_BCHW.to(device, exact), times, progress, watch)[:count]
    watch.check(prompts, first_index)
    return images_BCHW


def check_begins_a_group(first_index: int, group: int) -> None:
    """Raises ValueError; see `generate`."""
    if first_index % group:
        raise ValueError(
            f"first_index={first_index} is within a group of {group} images that are routed together; "
            f"begin at a multiple of {group}"
        )


def filled(prompts: Sequence[str], filling: int) -> list[str]:
    """So many more of the last one."""
    return [*prompts, *[prompts[-1]] * filling]


def steered_from(condition: Condition, told: dict[str, Tensor], negative: Sequence[str] | None) -> dict[str, Tensor]:
    """What the other branch of guidance is told: nothing, or what is said for each image."""
    nothing = {key: condition.nothing[key].expand_as(value) for key, value in told.items()}
    if negative is None:
        return nothing
    said = [i for i, prompt in enumerate(negative) if prompt.strip()]
    if said:
        for key, value in condition.encode([negative[i] for i in said]).items():
            nothing[key] = nothing[key].clone()
            nothing[key][said] = value
    return nothing


def start_of(
    latents: Tensor | None, seed: int, first_index: int, count: int, filling: int, image_shape: tuple[int, int, int]
) -> Tensor:
    """What images start from, those that fill the last group up too. Raises ValueError for latents that do not fit."""
    if latents is None:
        return noise_of(seed, range(first_index, first_index + count + filling), image_shape)
    wanted = [count, *image_shape]
    if list(latents.shape) != wanted or not latents.is_floating_point():
        raise ValueError(f"latents are {latents.dtype} of {list(latents.shape)}; give floating-point ones of {wanted}")
    if not filling:
        return latents
    beyond = first_index + count
    return torch.cat([latents, noise_of(seed, range(beyond, beyond + filling), image_shape).to(latents)])


class Watch:
    """Tells whoever wants to know of each step, and remembers which images were finite, without a wait for the
    device."""

    def __init__(self, on_step: OnStep, count: int) -> None:
        """`count`: of the images that are wanted; those behind them fill a group up."""
        self.on_step, self.count = on_step, count
        self.finite: list[Tensor] = []  # of each step, [B]

    def __call__(self, step: int, time: Tensor, x_BCHW: Tensor) -> Tensor:
        wanted_BCHW = x_BCHW[: self.count]
        if self.on_step is not go_on:
            wanted_BCHW = after(self.on_step, step, time, wanted_BCHW)
            x_BCHW = torch.cat([wanted_BCHW, x_BCHW[self.count :]])
        self.finite.append(wanted_BCHW.isfinite().flatten(1).all(dim=1))
        return x_BCHW

    def check(self, prompts: Sequence[str], first_index: int) -> None:
        """Raises NotFinite naming the images at fault and the first step that broke one of them."""
        finite_SB = torch.stack(self.finite).cpu()  # host sync
        if finite_SB[-1].all():
            return
        broken = (~finite_SB[-1]).nonzero()[:, 0].tolist()
        steps = [int((~finite_SB[:, i]).nonzero()[0, 0]) for i in broken]
        named = ", ".join(f"{first_index + i} ({prompts[i]!r})" for i in broken[:NAMED])
        others = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise NotFinite(
            f"of {len(prompts)} pictures {len(broken)} are not finite, from step {min(steps) + 1} of {len(finite_SB)} "
            f"on: {named}{others}; draw with less guidance, from a checkpoint before the training diverged, or, if the "
            "network overflows in a lower precision, in float32: run.dtype in the run's config.yaml, torch_dtype of a "
            "pipeline"
        )


def noise_of(seed: int, indices: Iterable[int], image_shape: tuple[int, int, int]) -> Tensor:
    """What images start from, [B, C, H, W]; each image's is a function of the seed and its own index."""
    # In float64: float32 normals differ between CPUs of different vector width.
    return torch.stack(
        [torch.randn(image_shape, generator=stream(seed, "sample", i), dtype=torch.float64) for i in indices]
    )
