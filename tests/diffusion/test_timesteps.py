"""Which times are trained and sampled."""

import math

import pytest
import torch

from megadit.diffusion.config import shift_of
from megadit.diffusion.timesteps import logit_normal, sampling_times, shift_time


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5)])
def test_logits_are_normal_and_shifted_by_log_shift(mean, std, shift):
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    times = logit_normal(torch.special.ndtri(quantiles), mean, std, shift)
    assert times.min() > 0 and times.max() < 1
    logits = times.logit()
    assert logits.mean().item() == pytest.approx(mean + math.log(shift), abs=1e-12)
    assert logits.std().item() == pytest.approx(std, rel=2e-3)  # of 2,000 quantiles: the far tails are cut
    assert times[999:1001].mean().item() == pytest.approx(
        shift * math.exp(mean) / (1 + shift * math.exp(mean)), abs=1e-6
    )


def test_shift_keeps_the_ends_and_moves_the_rest_towards_the_noise():
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(times, 3.0)
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert torch.all(shifted[1:-1] > times[1:-1])
    torch.testing.assert_close(shift_time(shifted, 1 / 3), times, rtol=0, atol=1e-15)
    assert torch.equal(shift_time(times, 1.0), times)


def test_shift_is_equation_23():
    """sqrt(m / n) t / (1 + (sqrt(m / n) - 1) t): a square with four times the pixels, from t = 0.5."""
    assert shift_time(torch.tensor(0.5), math.sqrt(4)).item() == pytest.approx(2 / 3, rel=1e-7)


@pytest.mark.parametrize(("tokens", "shift_tokens"), [(1024, 256), (64, 256), (96, 256), (256, 256)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shift_of_a_size_is_equation_23_after_the_shift_of_the_size_it_is_meant_for(shift, tokens, shift_tokens):
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    root, meant = math.sqrt(tokens / shift_tokens), shift_time(times, shift)
    expected = root * meant / (1 + (root - 1) * meant)
    found = shift_time(times, shift_of(shift, tokens, shift_tokens))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_noise_that_is_averaged_over_more_pixels_is_as_strong():
    """What equation 23 is derived from: the uncertainty t / (1 - t) x sqrt(1 / n) of a constant image is the same."""
    time = torch.tensor(0.3, dtype=torch.float64)
    other = shift_time(time, shift_of(1.0, 1024, 256))
    assert (other / (1 - other) / math.sqrt(1024)).item() == pytest.approx((time / (1 - time) / 16).item(), rel=1e-14)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_sampling_times_agree_with_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    times = sampling_times(steps, shift)
    assert times.dtype == torch.float32
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=2e-7)


def test_sampling_times_are_exact_in_float64():
    times = sampling_times(3, 2.0, torch.float64)
    torch.testing.assert_close(times, torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-15)
