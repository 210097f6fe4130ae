"""Small runs for the tests of the engines: build, step, and look at the state."""

import torch

from megadit.parallel.init import Normal, initialise
from megadit.runtime.launch import Process
from megadit.training.build import build_run, read_inputs
from megadit.training.config import check, load_config
from megadit.training.step import prepare


def fresh(rank, world_size, overrides, seed=1):
    """A run on this rank; no parameter starts at zero, so that every one of them moves."""
    config = load_config("tests/configs/tiny.yaml", overrides)
    process = Process(rank, world_size, rank, torch.device("cpu"))
    run = build_run(config, check(config, world_size), read_inputs(config), process)
    initialise(run.named, run.grid, seed, lambda name: Normal(0.05))
    parameters = dict(run.named)
    for fragment in run.engine.fragments():
        if fragment.kind == "master":
            flat = parameters[fragment.name].detach().flatten()
            fragment.flat.copy_(flat[fragment.start : fragment.start + fragment.flat.numel()])
    run.engine.restored(0)
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
        norms.append(float(run.engine.step(rate(step))))
    return norms


def copies(run):
    """{name: parameter} as it is now."""
    return {name: parameter.detach().clone() for name, parameter in run.named}
