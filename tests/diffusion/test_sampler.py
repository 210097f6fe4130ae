"""The integrators against solutions in closed form, and against the Euler steps of diffusers."""

import math

import pytest
import torch

from megadit.diffusion.sampler import SAMPLERS, euler, heun
from megadit.diffusion.timesteps import sampling_times


def noise(dtype=torch.float64):
    return torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_straight_path_is_followed_exactly(sampler, steps):
    start, velocity = noise(), noise().flip(0)
    end = sampler(lambda x, t: velocity, start, sampling_times(steps, 2.0, torch.float64))
    torch.testing.assert_close(end, start - velocity, rtol=0, atol=1e-14)


A, B = 1.5, 2.0


def solution(start):
    """x(0) of dx/dt = A x + B t from x(1) = start: x = c exp(A t) - B t / A - B / A^2."""
    c = (start + B / A + B / A**2) * math.exp(-A)
    return c - B / A**2


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(sampler, order, shift):
    errors = []
    for steps in (40, 80, 160):
        times = sampling_times(steps, shift, torch.float64)
        end = sampler(lambda x, t: A * x + B * t.view(-1, 1, 1, 1), noise(), times)
        errors.append((end - solution(noise())).norm().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_which_times_the_network_sees(sampler, order):
    """Euler the start of each step; Heun its end too, but for the last."""
    seen = []

    def network(x, timesteps):
        assert timesteps.shape == (2,)
        seen.extend(timesteps.unique().tolist())
        return x

    SAMPLERS[sampler](network, noise(), sampling_times(4, 1.0, torch.float64))
    assert seen == ([1.0, 0.75, 0.5, 0.25] if order == 1 else [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_progress_is_shown_each_step(sampler):
    shown = []

    def progress(steps):
        for step in steps:
            shown.append(step)
            yield step

    sampler(lambda x, t: x, noise(), sampling_times(3, 1.0, torch.float64), progress)
    assert shown == [0, 1, 2]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_as_diffusers_does(shift):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])

    def network(x, timesteps):
        return torch.sin(3 * x) + timesteps.view(-1, 1, 1, 1)

    theirs = noise(torch.float32)
    for timestep in scheduler.timesteps:
        velocity = network(theirs, timestep.expand(2) / 1000)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
    ours = euler(network, noise(torch.float32), sampling_times(7, shift))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_each_step_is_told_with_the_time_that_it_came_to(sampler):
    told, times = [], sampling_times(3, 2.0, torch.float64)
    seen = sampler(lambda x, t: torch.sin(x), noise(), times, on_step=lambda *args: told.append(args))
    assert [step for step, *_ in told] == [0, 1, 2]
    assert [time.item() for _, time, _ in told] == times[1:].tolist()
    assert torch.equal(told[-1][2], seen)
    assert torch.equal(seen, sampler(lambda x, t: torch.sin(x), noise(), times))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_what_is_returned_after_a_step_is_what_goes_on(sampler):
    times = sampling_times(4, 1.0, torch.float64)

    def network(x, t):
        return torch.sin(x)

    def from_zero(step, time, x):
        return torch.zeros_like(x).float() if step == 1 else None

    found = sampler(network, noise(), times, on_step=from_zero)
    assert torch.equal(found, sampler(network, 0 * noise(), times[2:])) and found.dtype == torch.float64
    with pytest.raises(ValueError, match=r"made \[1, 1, 3, 3\] of images \[2, 1, 3, 3\]"):
        sampler(network, noise(), times, on_step=lambda step, time, x: x[:1])
