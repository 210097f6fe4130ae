"""A window of data that spoils a run is found, left and passed over; the run ends as others do."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from megadit.checkpoint import latest
from megadit.data.arrays import Arrays
from megadit.data.loader import dataset_indices
from megadit.training.events import EVENTS_FILE
from megadit.training.metrics import METRICS_FILE, read_metrics
from megadit.training.progress import Progress
from megadit.training.spikes import SpikeDetector, robust_z
from tests.ranks import train_on

STEPS, BATCH, BAD = 90, 16, 61  # no image comes twice; the batch of this step is spoilt
COMMAND = [
    *("--config", "tests/configs/tiny.yaml", f"run.steps={STEPS}", f"data.global_batch={BATCH}", "data.kind=arrays"),
    *("run.dtype=float32", "zero.stage=1", "checkpoint.every=10", "optim.clip=0", "log.every=10"),
]
REWIND = ["guard.spike=8", "guard.window=50", "log.sample_ids=true"]


def test_outliers_do_not_move_the_score():
    history = [math.sin(i) for i in range(41)]
    assert robust_z(9.0, history) == pytest.approx(robust_z(9.0, [*history[:-2], 1e6, 1e6]), rel=0.1)
    assert robust_z(-9.0, history) < -5


def test_a_detector_needs_half_its_window_and_forgets_what_stood_out():
    detector = SpikeDetector(threshold=8, window=20)
    values = [1 + 0.05 * (i % 7) for i in range(40)]
    assert not any(detector.look(value, value) for value in values[:9])
    assert detector.look(100.0, 1.0) is None, "too early to tell"
    assert not any(detector.look(value, value) for value in values)
    assert detector.look(1.0, 100.0).startswith("gradient norm 100 is ")
    assert detector.look(100.0, 1.0).startswith("loss 100 is ")
    assert detector.look(1.1, 1.1) is None
    assert detector.look(1e-6, 1e-6) is None, "what falls is welcome"


def test_a_second_return_passes_over_both_windows():
    saved = Progress(step=20, updates=20)
    first = saved.gone_back(Progress(step=25, updates=25))
    assert (first.batch, first.passed_over, first.rewinds) == (25, 5, 1)
    # Before the next save: the same checkpoint again, and yet another return.
    bad = Progress(step=27, updates=27, passed_over=first.passed_over, rewinds=first.rewinds)
    again = saved.gone_back(bad)
    assert (again.batch, again.passed_over, again.rewinds) == (32, 12, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """scikit-learn's digits as they are, and with the images of one batch twenty times as bright."""
    folder, digits = tmp_path_factory.mktemp("spikes"), load_digits()
    images, captions = digits.images / 8 - 1, np.array([f"the digit {n}" for n in digits.target])
    np.savez(folder / "clean.npz", images=images, captions=captions)
    train = Arrays("train", str(folder / "clean.npz"))
    assert len(train) >= STEPS * BATCH
    bad = train.images(dataset_indices(0, BAD, len(train), BATCH))[:, 0].numpy()
    spoilt = [index for index, image in enumerate(images) if (np.abs(bad - image).max(axis=(1, 2)) < 1e-6).any()]
    assert len(spoilt) == BATCH
    images[spoilt] *= 20
    np.savez(folder / "spoilt.npz", images=images, captions=captions)
    return folder


def trained(folder, data, *overrides):
    results = train_on(2, *COMMAND, f"data.path={data}", f"run.dir={folder}", "log.evaluate_every=1000", *overrides)
    assert [status for status, _ in results] == [0, 0]
    return read_metrics(folder / METRICS_FILE)


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.mark.drill
def test_a_planted_spike_is_left_and_the_run_ends_as_others_do(data, tmp_path):
    undisturbed = [trained(tmp_path / f"{seed}", data / "clean.npz", f"run.seed={seed}")[-1] for seed in range(5)]
    found = trained(tmp_path / "run", data / "spoilt.npz", *REWIND)
    (spike,), (rewind,) = events(tmp_path / "run", "spike"), events(tmp_path / "run", "rewind")
    assert spike["step"] == BAD and "robust standard deviations" in spike["reason"]
    assert (rewind["to_step"], rewind["batches"]) == (60, [61, 61])
    # Every sample once, but for those that were passed over, which nobody saw.
    seen = [sample for line in found for sample in line["sample_ids"]]
    passed = range((BAD - 1) * BATCH, BAD * BATCH)
    assert seen == [sample for sample in range((STEPS + 1) * BATCH) if sample not in passed]
    losses = [line["heldout_loss"] for line in undisturbed]
    assert min(losses) <= found[-1]["heldout_loss"] <= max(losses)
    # Without it the same data leave a mark.
    spoilt = trained(tmp_path / "spoilt", data / "spoilt.npz")
    assert spoilt[-1]["heldout_loss"] > max(losses)
    assert events(tmp_path / "spoilt", "spike") == []


@pytest.mark.drill
def test_going_back_is_repeated_by_a_run_that_is_restarted(data, tmp_path):
    """Killed or stopped at any step, before, between or after: losses and samples are those of one life."""
    path, short = data / "spoilt.npz", ["log.tensorboard=false"]
    straight = trained(tmp_path / "straight", path, *REWIND, *short, "run.steps=75")
    for steps in ("58", "60", "66", "75"):
        restarted = trained(tmp_path / "restarted", path, *REWIND, *short, f"run.steps={steps}")
    for key in ("step", "loss", "grad_norm", "sample_ids"):
        assert [line[key] for line in restarted] == [line[key] for line in straight]
    assert len(events(tmp_path / "restarted", "rewind")) == 1


@pytest.mark.slow
def test_too_many_spikes_stop_a_run_at_a_checkpoint_before_them(data, tmp_path):
    overrides = [*REWIND, "guard.max_rewinds=0", f"data.path={data / 'spoilt.npz'}", f"run.dir={tmp_path}"]
    results = train_on(2, *COMMAND, *overrides)
    assert [status for status, _ in results] == [1, 1]
    assert "after 0 returns to older checkpoints (guard.max_rewinds)" in results[0][1]
    assert latest(tmp_path / "checkpoints").name == "step_00000060"
    assert torch.isfinite(torch.tensor([line["loss"] for line in read_metrics(tmp_path / METRICS_FILE)])).all()
