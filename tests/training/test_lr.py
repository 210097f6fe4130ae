"""The learning rate of a step."""

import math

import pytest

from megadit.training.lr import learning_rate
from megadit.zero import OptimConfig

STEPS = 20


def curve(**keys):
    config = OptimConfig(lr=2.0, **keys)
    return [learning_rate(config, step, STEPS) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_warm_up_is_linear_and_reaches_the_full_rate(warmup, decay):
    rates = curve(warmup=warmup, decay=decay)
    assert rates[:warmup] == pytest.approx([2.0 * step / warmup for step in range(1, warmup + 1)])
    assert rates[warmup] == max(rates) == 2.0


def test_constant_stays():
    assert curve(warmup=5)[5:] == [2.0] * 15


def test_cosine_is_half_a_cosine_that_falls_to_nearly_zero():
    rates = curve(warmup=4, decay="cosine")[4:]
    assert rates == pytest.approx([1 + math.cos(math.pi * i / 16) for i in range(16)])
    assert rates == sorted(rates, reverse=True)
    assert rates[8] == pytest.approx(1.0), "half-way it is half"
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_a_warm_up_longer_than_the_run_is_all_there_is(decay):
    assert curve(warmup=40, decay=decay) == pytest.approx([step / 20 for step in range(1, STEPS + 1)])


def test_the_warm_up_does_not_depend_on_the_number_of_steps():
    config = OptimConfig(lr=2.0, warmup=5, decay="cosine")
    assert learning_rate(config, 3, 10) == learning_rate(config, 3, 10**6)
