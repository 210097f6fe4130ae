"""Classifier-free guidance over a batch of both branches."""

import pytest
import torch

from megadit.diffusion.guidance import Guidance, guided, rescaled
from megadit.diffusion.sampler import euler, heun
from megadit.diffusion.timesteps import sampling_times

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
TIMES = torch.full((3,), 0.6, dtype=torch.float64)


def conditional(x, timesteps):
    return torch.sin(x) + timesteps.view(-1, 1, 1, 1)


def unconditional(x, timesteps):
    return torch.cos(x) * timesteps.view(-1, 1, 1, 1)


class Spy:
    """Both branches, the conditional one first, and which batches they were asked for."""

    def __init__(self):
        self.told, self.both = [], []

    def conditional(self, x, timesteps):
        self.told.append((x, timesteps))
        return conditional(x, timesteps)

    def network(self, x, timesteps):
        self.both.append((x, timesteps))
        (x_1, x_2), (t_1, t_2) = x.chunk(2), timesteps.chunk(2)
        return torch.cat([conditional(x_1, t_1), unconditional(x_2, t_2)])

    def guided(self, *args, **kwargs):
        return guided(self.conditional, self.network, Guidance(*args, **kwargs))


@pytest.mark.parametrize("scale", [0.0, 3.0, -1.0])
def test_guidance_extrapolates_from_the_unconditional_velocity(scale):
    plain, captioned = unconditional(X, TIMES), conditional(X, TIMES)
    expected = (1 - scale) * plain + scale * captioned
    torch.testing.assert_close(Spy().guided(scale)(X, TIMES), expected, rtol=0, atol=1e-14)


def test_both_branches_see_the_same_images_and_times_in_one_call():
    spy = Spy()
    spy.guided(2.0)(X, TIMES)
    ((x, timesteps),) = spy.both
    assert torch.equal(x, torch.cat([X, X])) and torch.equal(timesteps, torch.cat([TIMES, TIMES]))
    assert not spy.told


def test_without_guidance_the_conditional_branch_alone_is_evaluated():
    spy = Spy()
    assert torch.equal(spy.guided(1.0, rescale=0.7)(X, TIMES), conditional(X, TIMES))
    ((x, timesteps),) = spy.told
    assert x is X and timesteps is TIMES and not spy.both


@pytest.mark.parametrize(
    ("dtype", "begin", "end", "inside"),
    [
        (torch.float64, 0.25, 0.75, [False, True, True, True]),
        (torch.float32, 0.3, 0.6, [False, False, True, False]),
        (torch.float64, 0.5, 1.0, [True, True, True, False]),
        (torch.float64, 0.0, 0.2, [False, False, False, False]),
        (torch.float32, 0.0, 1.0, [True, True, True, True]),
    ],
)
def test_only_times_within_the_interval_are_guided(dtype, begin, end, inside):
    """An Euler grid of four steps is evaluated at 1, 0.75, 0.5, 0.25: the end of each limit belongs to it."""
    spy, x = Spy(), X.to(dtype)
    found = euler(spy.guided(3.0, begin=begin, end=end), x, sampling_times(4, 1.0, dtype))
    assert [len(images) for images, _ in spy.both] == [6] * sum(inside)
    assert [len(images) for images, _ in spy.told] == [3] * (4 - sum(inside))
    for time, guides in zip((1.0, 0.75, 0.5, 0.25), inside, strict=True):
        t = torch.full((3,), time, dtype=dtype)
        told, untold = conditional(x, t), unconditional(x, t)
        x = x - 0.25 * (untold + 3 * (told - untold) if guides else told)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-5)


def test_limits_are_met_in_every_precision():
    """0.7 in float32 is below 0.7, and the grid's is a rounding beside it."""
    for dtype in (torch.float32, torch.float64):
        spy = Spy()
        euler(spy.guided(2.0, begin=0.3, end=0.7), X.to(dtype), sampling_times(10, 1.0, dtype))
        assert [round(float(t[0]), 6) for _, t in spy.both] == [0.7, 0.6, 0.5, 0.4, 0.3]


def test_heun_asks_for_each_of_its_two_times():
    spy = Spy()
    heun(spy.guided(2.0, begin=0.5, end=0.75), X, sampling_times(4, 1.0, torch.float64))
    assert [float(t[0]) for _, t in spy.both] == [0.75, 0.75, 0.5, 0.5]
    assert [float(t[0]) for _, t in spy.told] == [1.0, 0.25, 0.25]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaling_is_the_papers_formula(share):
    """Equations 14 to 16 of arXiv 2305.08891, an image at a time."""
    told, steered = X, 2.5 * X + torch.cos(X)
    found = rescaled(steered, told, share)
    for i in range(len(X)):
        brought_back = steered[i] * (told[i].std() / steered[i].std())
        expected = share * brought_back + (1 - share) * steered[i]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-14)
    spread = found.flatten(1).std(dim=1)
    if share == 1.0:
        torch.testing.assert_close(spread, told.flatten(1).std(dim=1), rtol=1e-14, atol=0)
    else:
        assert (spread > 1.1 * told.flatten(1).std(dim=1)).all()


def test_rescaling_as_diffusers_does():
    theirs = pytest.importorskip(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", reason="diffusers is the reference"
    )
    steered = 2.5 * X + torch.cos(X)
    expected = theirs.rescale_noise_cfg(steered, X, guidance_rescale=0.7)
    torch.testing.assert_close(rescaled(steered, X, 0.7), expected, rtol=0, atol=1e-14)


def test_a_velocity_without_spread_stays_as_it_is():
    assert torch.equal(rescaled(torch.full_like(X, 2.0), X, 1.0), torch.full_like(X, 2.0))


def test_guidance_with_rescaling_brings_the_guided_velocity_back():
    plain, captioned = unconditional(X, TIMES), conditional(X, TIMES)
    steered = plain + 4 * (captioned - plain)
    found = Spy().guided(4.0, rescale=0.7)(X, TIMES)
    torch.testing.assert_close(found, rescaled(steered, captioned, 0.7), rtol=0, atol=1e-12)
    assert not torch.allclose(found, steered)
