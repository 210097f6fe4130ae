"""Samplers by name: Euler and Heun of ours, and solvers of diffusers that take fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megadit.diffusion.sampler import SAMPLERS as OURS
from megadit.diffusion.sampler import Network, OnStep, Progress, after, go_on


class Solver(Protocol):
    """Images at times[0], the noise, taken to times[-1], which falls."""

    def __call__(
        self, network: Network, x_BCHW: Tensor, times: Tensor, progress: Progress = ..., on_step: OnStep = ...
    ) -> Tensor: ...


def solved(
    make: Callable[[], Any],
    network: Network,
    x_BCHW: Tensor,
    times: Tensor,
    progress: Progress = iter,
    on_step: OnStep = go_on,
) -> Tensor:
    """With a multistep scheduler of diffusers, on exactly these times: one evaluation of the network per step.

    `make`: makes the scheduler. Its coefficients are computed in float64, the images in their own precision. What
    `on_step` changes is what the next step starts from, but the scheduler remembers the steps before it as they were.
    Raises ValueError if diffusers is not installed.
    """
    scheduler = on_times(make(), times)
    for i in progress(range(len(times) - 1)):
        velocity_BCHW = network(x_BCHW, times[i].expand(len(x_BCHW)))
        next_BCHW = advanced(scheduler, i, x_BCHW, velocity_BCHW)
        if i == 0 and scheduler.sigmas[0] == 1:
            # Their polynomials are in log(signal / noise), and pure noise is infinitely far away: a limit in which the
            # next step is a first one, and that they would divide by.
            scheduler.lower_order_nums = 0
        x_BCHW = after(on_step, i, times[i + 1], next_BCHW)
    return x_BCHW


def advanced(scheduler: Any, i: int, x_BCHW: Tensor, velocity_BCHW: Tensor) -> Tensor:
    """The images after step i."""
    if scheduler.config.prediction_type == "flow_prediction":
        return scheduler.step(velocity_BCHW, scheduler.timesteps[i], x_BCHW, return_dict=False)[0]
    # DPM-Solver++ of diffusers rounds the images that a step starts from to float32, and the step is linear in them:
    # it takes the step from zero, and their part is added here in their own precision.
    now, then = scheduler.sigmas[i], scheduler.sigmas[i + 1]
    image_BCHW = x_BCHW - now * velocity_BCHW
    from_zero = scheduler.step(image_BCHW, scheduler.timesteps[i], torch.zeros_like(x_BCHW), return_dict=False)[0]
    return then / now * x_BCHW + from_zero


def on_times(scheduler: Any, times: Tensor) -> Any:
    """A new scheduler whose noise levels are exactly these times: diffusers' own grids begin below 1."""
    exact = times.detach().to("cpu", torch.float64).clamp(max=1)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas, scheduler.timesteps = exact, exact[:-1]
    scheduler.set_begin_index(0)
    return scheduler


def make_scheduler(name: str, **settings: Any) -> Any:
    """A scheduler of diffusers for rectified flow. Raises ValueError if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"this sampler is diffusers' {name}: {error}; install it with pip install -e '.[encoders]', or use "
            f"sampler={' or '.join(OURS)}"
        ) from error
    return getattr(diffusers, name)(use_flow_sigmas=True, **settings)


def make_dpm(order: int = 2) -> Any:
    """DPM-Solver++, multistep, by default 2M (Lu et al., arXiv 2211.01095)."""
    return make_scheduler(
        "DPMSolverMultistepScheduler",
        algorithm_type="dpmsolver++",
        prediction_type="sample",
        solver_order=order,
    )


def make_unipc(order: int = 2) -> Any:
    """UniPC-B2(h) (Zhao et al., arXiv 2302.04867); its corrector adds one to the order."""
    return make_scheduler(
        "UniPCMultistepScheduler", solver_type="bh2", prediction_type="flow_prediction", solver_order=order
    )


# Of order 2, which bears guidance better than 3: diffusers' own recommendation.
SOLVERS = {"dpm++": make_dpm, "unipc": make_unipc}
SAMPLERS: dict[str, Solver] = {**OURS, **{name: partial(solved, make) for name, make in SOLVERS.items()}}
