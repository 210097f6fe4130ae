"""The line from image to noise, its velocity, and the loss."""

import pytest
import torch

from megadit.diffusion.objective import corrupt, velocity_loss


@pytest.fixture
def pair():
    """(clean, noise), three samples each."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator).unbind()


def test_the_path_runs_from_the_image_to_the_noise_sample_by_sample(pair):
    clean, noise = pair
    noisy, _ = corrupt(clean, noise, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert torch.equal(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1], rtol=0, atol=1e-12)
    assert torch.equal(noisy[2], noise[2])


def test_the_target_is_the_paths_derivative(pair):
    clean, noise = pair
    early, late = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.9, 0.4, 1.0]).double()
    (start, target), (end, same) = corrupt(clean, noise, early), corrupt(clean, noise, late)
    slope = (end - start) / (late - early)[:, None, None, None]
    torch.testing.assert_close(slope, target, rtol=0, atol=1e-14)
    assert torch.equal(target, same)  # the path is straight


def test_one_step_along_the_target_reaches_both_ends(pair):
    clean, noise = pair
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    noisy, target = corrupt(clean, noise, times)
    t = times[:, None, None, None]
    torch.testing.assert_close(noisy - t * target, clean, rtol=0, atol=1e-14)
    torch.testing.assert_close(noisy + (1 - t) * target, noise, rtol=0, atol=1e-14)


def test_loss_is_each_samples_mean_square(pair):
    prediction, target = pair
    expected = [
        sum((p - t) ** 2 for p, t in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / 32
        for a, b in zip(prediction, target, strict=True)
    ]
    assert velocity_loss(prediction, target).tolist() == pytest.approx(expected, rel=1e-14)
