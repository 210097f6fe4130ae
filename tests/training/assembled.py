"""A run assembled on one rank of a test, as `megadit.train` assembles it."""

from collections.abc import Callable

import torch

from megadit.parallel.init import Init, initialise
from megadit.runtime.launch import Process
from megadit.runtime.stopping import StopRequests
from megadit.training.build import Run, build_run, read_inputs
from megadit.training.config import check, load_config
from megadit.training.loop import Oversight, prepare_directory, train
from megadit.training.progress import Progress
from megadit.training.step import Unread, train_step

CONFIG = "tests/configs/tiny.yaml"


def assembled(rank: int, world_size: int, *overrides: str, path: str = CONFIG) -> Run:
    """The run of a configuration with `overrides`, before its first step. Collective."""
    config = load_config(path, overrides)
    process = Process(rank, world_size, rank, torch.device("cpu"))
    return build_run(config, check(config, world_size), read_inputs(config), process)


def make_step(run: Run, step: int) -> Unread:
    """Step `step` of a run to which nothing has happened."""
    return train_step(run, after(step - 1)).unread


def after(step: int) -> Progress:
    """Where a run is to which nothing has happened."""
    return Progress(step, step)


def train_alone(run: Run, start: Progress) -> None:
    """Make the steps after `start` as `megadit.train` does, but that nobody can ask the run to stop. Collective."""
    stops = StopRequests()
    try:
        train(run, start, Oversight(prepare_directory(run), stops, lambda step, doing="": None))
    finally:
        stops.close()


def redraw(run: Run, seed: int, init_of: Callable[[str], Init]) -> None:
    """Give the run other weights, its masters too."""
    initialise(run.named, run.grid, seed, init_of)
    parameters = dict(run.named)
    for fragment in run.engine.fragments():
        if fragment.kind == "master":
            flat = parameters[fragment.name].detach().flatten()
            fragment.flat.copy_(flat[fragment.start : fragment.start + fragment.flat.numel()])
    run.engine.restored(0)
