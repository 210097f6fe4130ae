"""A training whose steps are on images of different sizes, through the loop to its last step."""

import pytest

from megadit.model.count import forward_flops
from megadit.training.config import load_config, training_tokens
from megadit.training.loop import resume
from megadit.training.metrics import METRICS_FILE, read_metrics
from megadit.training.progress import Progress
from tests.parity.mixed import OVERRIDES, SIZES, start
from tests.parity.training import CONFIG
from tests.ranks import run_ranks
from tests.training.assembled import train_alone

STEPS = ["model.layers=2", "run.steps=4", "log.every=2"]


def trained(rank, world_size, overrides):
    """Where a resumed run begins that has trained."""
    run = start(rank, world_size, overrides)
    train_alone(run, Progress())
    return resume(run).step


def test_rates_are_those_of_the_sizes_of_the_steps(tmp_path):
    """On average over the steps that are read together, as the seconds are."""
    overrides = [*STEPS, f"run.dir={tmp_path}"]
    assert run_ranks(trained, 1, overrides) == [4]
    config, lines = load_config(CONFIG, [*OVERRIDES, *overrides]), read_metrics(tmp_path / METRICS_FILE)
    tokens = [training_tokens(config, SIZES[step % len(SIZES)]) for step in range(1, 5)]
    assert tokens == [12, 8, 8, 12]
    work = [3 * config.data.global_batch * forward_flops(config.model, config.text, count) for count in tokens]
    for begin in (0, 2):
        mean = sum(work[begin : begin + 2]) / 2
        for line in lines[begin : begin + 2]:
            assert line["tflops_per_gpu"] * line["seconds"] * 1e12 == pytest.approx(mean, rel=1e-9)
    assert work[0] != work[1]
