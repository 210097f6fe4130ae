"""From noise to image: the probability-flow ODE dx/dt = v(x, t), integrated from t = 1 to t = 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]  # (x_BCHW, timesteps_B) -> velocity_BCHW
Progress = Callable[[Iterable[int]], Iterable[int]]
# (step from 0, the time that the images have come to, the images) -> what to go on with; None: the images as they are.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


def go_on(step: int, time: Tensor, x_BCHW: Tensor) -> None:
    """The `OnStep` that leaves the images as they are."""


def euler(
    network: Network, x_BCHW: Tensor, times: Tensor, progress: Progress = iter, on_step: OnStep = go_on
) -> Tensor:
    """First order: one evaluation of the network per step."""
    for i in progress(range(len(times) - 1)):
        x_BCHW = x_BCHW + (times[i + 1] - times[i]) * network(x_BCHW, times[i].expand(len(x_BCHW)))
        x_BCHW = after(on_step, i, times[i + 1], x_BCHW)
    return x_BCHW


def heun(network: Network, x_BCHW: Tensor, times: Tensor, progress: Progress = iter, on_step: OnStep = go_on) -> Tensor:
    """Second order (Karras et al., arXiv 2206.00364, algorithm 1): two evaluations per step, one in the last."""
    last = len(times) - 2
    for i in progress(range(last + 1)):
        dt = times[i + 1] - times[i]
        slope = network(x_BCHW, times[i].expand(len(x_BCHW)))
        ahead = x_BCHW + dt * slope
        if i < last:
            slope = (slope + network(ahead, times[i + 1].expand(len(x_BCHW)))) / 2
        x_BCHW = after(on_step, i, times[i + 1], x_BCHW + dt * slope)
    return x_BCHW


def after(on_step: OnStep, step: int, time: Tensor, x_BCHW: Tensor) -> Tensor:
    """What `on_step` makes of the images. Raises ValueError for another shape than theirs."""
    changed = on_step(step, time, x_BCHW)
    if changed is None:
        return x_BCHW
    if changed.shape != x_BCHW.shape:
        raise ValueError(
            f"what is to be done after a step made {list(changed.shape)} of images {list(x_BCHW.shape)}; return "
            "images of their shape, or None"
        )
    return changed.to(x_BCHW)


SAMPLERS = {"euler": euler, "heun": heun}
