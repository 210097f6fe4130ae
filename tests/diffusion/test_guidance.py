"""Classifier-free guidance over a batch of both branches."""

import pytest
import torch

from megadit.diffusion.guidance import guided

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
TIMES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def conditional(x, timesteps):
    return torch.sin(x) + timesteps.view(-1, 1, 1, 1)


def unconditional(x, timesteps):
    return torch.cos(x) * timesteps.view(-1, 1, 1, 1)


def network(x, timesteps):
    """Both branches: the first half of the batch has the caption."""
    (x_1, x_2), (t_1, t_2) = x.chunk(2), timesteps.chunk(2)
    return torch.cat([conditional(x_1, t_1), unconditional(x_2, t_2)])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -1.0])
def test_guidance_extrapolates_from_the_unconditional_velocity(scale):
    plain, captioned = unconditional(X, TIMES), conditional(X, TIMES)
    expected = (1 - scale) * plain + scale * captioned
    torch.testing.assert_close(guided(network, scale)(X, TIMES), expected, rtol=0, atol=1e-14)


def test_both_branches_see_the_same_images_and_times_in_one_call():
    calls = []

    def spy(x, timesteps):
        calls.append((x, timesteps))
        return network(x, timesteps)

    guided(spy, 2.0)(X, TIMES)
    ((x, timesteps),) = calls
    assert torch.equal(x, torch.cat([X, X])) and torch.equal(timesteps, torch.cat([TIMES, TIMES]))
