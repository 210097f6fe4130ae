"""Small runs for the tests of the engines: build, step, and look at the state."""

import torch

from megadit.parallel.init import Normal
from megadit.training.step import prepare
from tests.training.assembled import assembled, redraw


def fresh(rank, world_size, overrides, seed=1):
    """A run on this rank; no parameter starts at zero, so that every one of them moves."""
    run = assembled(rank, world_size, *overrides)
    redraw(run, seed, lambda name: Normal(0.05))
    return run


def backward(run, step):
    """The gradients of step `step`, not yet reduced."""
    noisy, target, keywords = prepare(run, run.loader.batch(step), step, caption_dropout=0.3)
    run.pipeline.train(noisy, target, keywords)


def rate(step):
    """A learning rate that differs from step to step."""
    return 3e-3 / step


def advance(run, steps):
    """Make these steps; the gradient norms."""
    norms = []
    for step in steps:
        backward(run, step)
        run.engine.reduce_gradients()
        norms.append(float(run.engine.step(rate(step), torch.zeros(())).norm))
    return norms


def copies(run):
    """{name: parameter} as it is now."""
    return {name: parameter.detach().clone() for name, parameter in run.named}
