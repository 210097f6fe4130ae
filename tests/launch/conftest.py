"""One training of four processes, as two tensor-parallel pairs: what all ways to start and to stop it must equal."""

import subprocess

import numpy as np
import pytest

from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.launch.environment import environ

STEPS = 30


class Training:
    """A small training on the digits: its command line after the script's name, and its curve once it has run."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.steps = STEPS
        self.expected = []

    def curve(self, folder):
        """Losses and gradient norms of a finished run, with all their digits."""
        lines = read_metrics(folder / METRICS_FILE)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        return [(line["loss"], line["grad_norm"]) for line in lines]

    def done(self, folder):
        """The steps that a run has made."""
        return len(read_metrics(folder / METRICS_FILE)) if (folder / METRICS_FILE).exists() else 0


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """The training, run once by torchrun on this machine, undisturbed."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("undisturbed")
    digits = load_digits()
    # A file, for every process would import sklearn otherwise.
    captions = np.array([f"a {digit}" for digit in digits.target])
    np.savez(folder / "digits.npz", images=(digits.images / 8 - 1).astype(np.float32), captions=captions)
    training = Training([
        "examples/configs/digits.yaml", "data.kind=arrays", f"data.path={folder}/digits.npz", "run.dtype=float64",
        "model.width=32", "model.heads=4", "model.head_width=8", "data.global_batch=16", "parallel.tensor=2",
        "zero.stage=0", f"run.steps={STEPS}", "checkpoint.every=1000", "log.every=1", "log.evaluate_every=0",
        "log.sample_every=0", "log.tensorboard=false",
    ])  # fmt: skip
    done = subprocess.run(
        ["bash", "examples/launch/torchrun_one_node.sh", *training.arguments, f"run.dir={folder}/run"],
        env=environ(NPROC=4), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    training.expected = training.curve(folder / "run")
    return training
