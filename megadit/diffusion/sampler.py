"""From noise to image: the probability-flow ODE dx/dt = v(x, t), integrated from t = 1 to t = 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]  # (x_BCHW, timesteps_B) -> velocity_BCHW
Progress = Callable[[Iterable[int]], Iterable[int]]


def euler(network: Network, x_BCHW: Tensor, times: Tensor, progress: Progress = iter) -> Tensor:
    """First order: one evaluation of the network per step."""
    for i in progress(range(len(times) - 1)):
        x_BCHW = x_BCHW + (times[i + 1] - times[i]) * network(x_BCHW, times[i].expand(len(x_BCHW)))
    return x_BCHW


def heun(network: Network, x_BCHW: Tensor, times: Tensor, progress: Progress = iter) -> Tensor:
    """Second order (Karras et al., arXiv 2206.00364, algorithm 1): two evaluations per step, one in the last."""
    last = len(times) - 2
    for i in progress(range(last + 1)):
        dt = times[i + 1] - times[i]
        slope = network(x_BCHW, times[i].expand(len(x_BCHW)))
        ahead = x_BCHW + dt * slope
        if i < last:
            slope = (slope + network(ahead, times[i + 1].expand(len(x_BCHW)))) / 2
        x_BCHW = x_BCHW + dt * slope
    return x_BCHW


SAMPLERS = {"euler": euler, "heun": heun}
