"""Every sampler against flows whose velocity is known in closed form: orders, times, step counts, guidance.

Data are a mixture of Gaussians in each pixel, so that the exact velocity of its rectified flow is a formula. Where a
single Gaussian is meant, the path is one too.
"""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from megadit.diffusion.guidance import Guidance, guided, rescaled
from megadit.diffusion.timesteps import sampling_times
from megadit.sampling.solvers import SAMPLERS, SOLVERS, make_dpm, make_unipc, solved

STARTS = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SPREAD = 0.6


def mixture(means, weights, spread=SPREAD):
    """E[noise - image | x_t = x] where the pixels of an image are of a mixture of Gaussians (Bayes, term by term)."""
    means, weights = (torch.tensor(values, dtype=torch.float64) for values in (means, weights))

    def velocity(x, timesteps):
        x, t = x[..., None], timesteps.view(-1, 1, 1, 1, 1)
        means_, weights_ = means.to(x), weights.to(x)
        off, variance = x - (1 - t) * means_, ((1 - t) * spread) ** 2 + t**2
        posterior = (weights_.log() - off**2 / (2 * variance)).softmax(-1)
        image = means_ + (1 - t) * spread**2 / variance * off
        noise = t / variance * off
        return (posterior * (noise - image)).sum(-1)

    return velocity


TOLD, UNTOLD = mixture([0.8], [1.0], 0.4), mixture([-1.0, 0.3, 1.1], [0.3, 0.5, 0.2])
WHOLE, INNER = (1.0, 0.0), (0.8, 0.2)


def grid(steps, between):
    return torch.linspace(*between, steps + 1, dtype=torch.float64)


def runge_kutta(velocity, x, times):
    """The classical fourth-order method."""
    for t, after in zip(times, times[1:], strict=False):
        h, at = after - t, t.expand(len(x))
        a = velocity(x, at)
        b = velocity(x + h / 2 * a, at + h / 2)
        c = velocity(x + h / 2 * b, at + h / 2)
        d = velocity(x + h * c, at + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


@pytest.fixture(scope="module", params=[WHOLE, INNER], ids=["whole", "inner"])
def between(request):
    return request.param


@pytest.fixture(scope="module")
def reference(between):
    """Where 1,000 steps end."""
    return runge_kutta(UNTOLD, STARTS, grid(1000, between))


def error(sampler, between, steps, reference):
    return (sampler(UNTOLD, STARTS, grid(steps, between)) - reference).norm().item()


def slope(steps, errors):
    """Of the least-squares line through the logarithms, negated: the order."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_the_reference_is_the_closed_form_of_a_single_gaussian():
    """Its path: x(t) = (1 - t) mean + sqrt((1 - t)^2 spread^2 + t^2) x(1)."""
    end = 0.7 + 0.4 * STARTS
    found = runge_kutta(mixture([0.7], [1.0], 0.4), STARTS, grid(1000, WHOLE))
    torch.testing.assert_close(found, end, rtol=0, atol=1e-11)


ORDERS = {
    "euler": (SAMPLERS["euler"], 1),
    "heun": (SAMPLERS["heun"], 2),
    "dpm++": (SAMPLERS["dpm++"], 2),
    "unipc": (SAMPLERS["unipc"], 2),
    "dpm++ of order 1": (partial(solved, partial(make_dpm, 1)), 1),
    "unipc of order 3": (partial(solved, partial(make_unipc, 3)), 2),
}
STEPS = (80, 160, 320)


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_order(name, between, reference):
    """Heun's last step is Euler's, and so is that of diffusers' solvers: a first-order step adds an error of second
    order, so none is of a higher order than 2 over all steps.

    Near t = 0 and t = 1 a step of theirs is long in log(signal / noise), in which they interpolate, however short it is
    in time: over the whole path their errors are as 1 / steps^2 but for logarithms of the number of steps.
    """
    sampler, order = ORDERS[name]
    found = slope(STEPS, [error(sampler, between, steps, reference) for steps in STEPS])
    long_steps = between == WHOLE and order == 2 and name != "heun"
    assert found == pytest.approx(order, abs=0.25 if long_steps else 0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "order"),
    [(SAMPLERS["dpm++"], 2), (SAMPLERS["unipc"], 3), (partial(solved, partial(make_unipc, 3)), 4)],
    ids=["dpm++", "unipc", "unipc of order 3"],
)
def test_the_order_before_the_last_steps(sampler, order):
    """UniPC's corrector adds one to its order, until the steps that diffusers ends with in lower orders."""
    reference = runge_kutta(UNTOLD, STARTS, grid(1000, (0.9, 0.1)))
    errors = []
    for steps in STEPS:
        times, reached = grid(steps, (0.9, 0.1)), []
        times = torch.cat([times, times[-1:] - 0.03, times[-1:] - 0.06])
        sampler(UNTOLD, STARTS, times, on_step=lambda step, time, x, reached=reached: reached.append(x))
        errors.append((reached[steps - 1] - reference).norm().item())
    assert slope(STEPS, errors) == pytest.approx(order, abs=0.12)


def test_twenty_steps_of_a_solver_are_better_than_a_hundred_of_euler(reference, between):
    euler = error(SAMPLERS["euler"], between, 100, reference)
    assert all(error(SAMPLERS[name], between, 20, reference) < euler / 2 for name in ("heun", *SOLVERS))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_straight_path_is_followed_exactly_from_pure_noise(sampler, dtype, steps, shift):
    start, velocity = STARTS.to(dtype), STARTS.flip(0).to(dtype)
    end = sampler(lambda x, t: velocity, start, sampling_times(steps, shift, dtype))
    assert end.dtype == dtype
    torch.testing.assert_close(end, start - velocity, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0])
def test_the_network_sees_exactly_our_times(name, shift):
    times, seen = sampling_times(6, shift, torch.float64), []

    def network(x, timesteps):
        assert timesteps.shape == (2,) and timesteps.dtype == torch.float64
        seen.append(timesteps[0].item())
        return UNTOLD(x, timesteps)

    SAMPLERS[name](network, STARTS, times)
    twice = [time for time in times.tolist() for _ in range(2)][1:-2]
    expected = [*twice] if name == "heun" else times[:-1].tolist()
    assert seen == expected


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_is_eulers(name):
    times = sampling_times(1, 1.0, torch.float64)
    expected = STARTS - UNTOLD(STARTS, times[:1].expand(2))
    torch.testing.assert_close(SAMPLERS[name](UNTOLD, STARTS, times), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_is_float64_rounded(name):
    exact = SAMPLERS[name](UNTOLD, STARTS, sampling_times(20, 2.0, torch.float64))
    single = SAMPLERS[name](UNTOLD, STARTS.float(), sampling_times(20, 2.0))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)


def test_dpm_solver_is_the_papers_algorithm():
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095, with alpha = 1 - t and sigma = t, written out."""
    times = grid(16, INNER)
    x, before = STARTS, None
    for i, (s, t) in enumerate(zip(times, times[1:], strict=False)):
        image = x - s * UNTOLD(x, s.expand(2))
        h = math.log((1 - t) / t) - math.log((1 - s) / s)
        estimate = image
        if before is not None and i < 15:
            r = (math.log((1 - s) / s) - math.log((1 - times[i - 1]) / times[i - 1])) / h
            estimate = (1 + 1 / (2 * r)) * image - before / (2 * r)
        x, before = t / s * x - (1 - t) * math.expm1(-h) * estimate, image
    torch.testing.assert_close(SAMPLERS["dpm++"](UNTOLD, STARTS, times), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
def test_progress_and_on_step_see_every_step(name):
    times, shown, told = sampling_times(4, 1.0, torch.float64), [], []

    def progress(steps):
        for step in steps:
            shown.append(step)
            yield step

    end = SAMPLERS[name](UNTOLD, STARTS, times, progress, lambda *args: told.append(args))
    assert shown == [step for step, *_ in told] == [0, 1, 2, 3]
    assert [time.item() for _, time, _ in told] == times[1:].tolist() and torch.equal(told[-1][2], end)


# --- guidance ---------------------------------------------------------------------------------------------------------


def branches(x, timesteps):
    """The conditional half first."""
    (x_1, x_2), (t_1, t_2) = x.chunk(2), timesteps.chunk(2)
    return torch.cat([TOLD(x_1, t_1), UNTOLD(x_2, t_2)])


def by_hand(guidance):
    """The guided velocity as one formula of the two closed forms."""

    def velocity(x, timesteps):
        told, untold = TOLD(x, timesteps), UNTOLD(x, timesteps)
        if not guidance.begin <= timesteps[0] <= guidance.end:
            return told
        steered = (1 - guidance.scale) * untold + guidance.scale * told
        return rescaled(steered, told, guidance.rescale)

    return velocity


GUIDANCE = {
    "guided": Guidance(3.0),
    "rescaled": Guidance(5.0, rescale=0.7),
    "interval": Guidance(3.0, begin=0.2, end=0.7),
    "all": Guidance(4.0, 0.5, 0.1, 0.9),
    "none": Guidance(1.0),
    "away": Guidance(0.0),
}


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_guided_path_is_that_of_the_guided_velocity(name, guidance):
    times = sampling_times(7, 2.0, torch.float64)
    found = SAMPLERS[name](guided(TOLD, branches, guidance), STARTS, times)
    torch.testing.assert_close(found, SAMPLERS[name](by_hand(guidance), STARTS, times), rtol=0, atol=1e-12)
    plain = SAMPLERS[name](TOLD, STARTS, times)
    assert torch.equal(found, plain) if guidance.scale == 1 else (found - plain).abs().max() > 0.05


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_cost_two_evaluations_where_they_are_guided_and_one_elsewhere(name):
    """Of seven steps at shift 1, times 6/7 to 2/7 lie in between: five of them."""
    sizes = []

    def counted(network):
        def call(x, timesteps):
            sizes.append(len(x))
            return network(x, timesteps)

        return call

    guidance = Guidance(3.0, begin=0.25, end=0.9)
    SAMPLERS[name](guided(counted(TOLD), counted(branches), guidance), STARTS, sampling_times(7, 1.0, torch.float64))
    calls = 2 if name == "heun" else 1
    assert (sizes.count(4), sizes.count(2)) == ((5 * calls, 2 + 1) if name == "heun" else (5, 2))
    assert sum(sizes) == 2 * (2 * 5 * calls + (3 if name == "heun" else 2))


SMOOTH_TOLD, SMOOTH_UNTOLD = mixture([0.8], [1.0], 0.7), mixture([-0.8, 0.5], [0.4, 0.6], 0.8)


def smooth_branches(x, timesteps):
    (x_1, x_2), (t_1, t_2) = x.chunk(2), timesteps.chunk(2)
    return torch.cat([SMOOTH_TOLD(x_1, t_1), SMOOTH_UNTOLD(x_2, t_2)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)])
def test_guidance_keeps_the_order(name, order):
    velocity = guided(SMOOTH_TOLD, smooth_branches, Guidance(2.0))
    reference = runge_kutta(lambda x, t: 2 * SMOOTH_TOLD(x, t) - SMOOTH_UNTOLD(x, t), STARTS, grid(1000, INNER))
    errors = [(SAMPLERS[name](velocity, STARTS, grid(steps, INNER)) - reference).norm().item() for steps in STEPS]
    assert slope(STEPS, errors) == pytest.approx(order, abs=0.06)


# --- without diffusers ------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["diffusers"] = None
import torch
from megadit.sampling.solvers import SAMPLERS
times = torch.linspace(1, 0, 3)
print(SAMPLERS["heun"](lambda x, t: x, torch.ones(1, 1, 1, 1), times).item())
for refused in (lambda: SAMPLERS["unipc"](lambda x, t: x, torch.ones(1, 1, 1, 1), times),):
    try:
        refused()
    except ValueError as error:
        print(error)
"""


def test_a_missing_package_is_named_and_our_own_samplers_need_none():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    heun, unipc = done.stdout.splitlines()
    assert float(heun) == 0.3125
    assert unipc.startswith("this sampler is diffusers' UniPCMultistepScheduler: ")
    assert unipc.endswith("install it with pip install -e '.[encoders]', or use sampler=euler or heun")


def test_diffusers_is_imported_when_a_solver_of_it_is_used():
    code = "import sys, megadit.sampling.generate; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
