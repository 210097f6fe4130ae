"""One golden curve: 20 steps of tests/configs/tiny.yaml in float64 on one process, whatever else changes.

A change that means to alter the numbers regenerates it, and says why in a line of CHANGELOG.md:

    python -m tests.training.test_golden
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.launch.environment import environ

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_float64.json"
KEYS = ("loss", "grad_norm")


def train(folder):
    """{key: its value at each of the 20 steps}, on kernels that are the same on every x86 processor.

    Those that follow the processor's vectors sum in another order, which AdamW makes 1e-8 of within 20 steps.
    """
    command = ["--config", "tests/configs/tiny.yaml", "run.dtype=float64", "run.steps=20", f"run.dir={folder}"]
    same = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "MKL_NUM_THREADS": 1}
    trained = subprocess.run(
        [sys.executable, "-m", "megadit.train", *command], env=environ(**same), capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr
    lines = read_metrics(folder / METRICS_FILE)
    return {key: [line[key] for line in lines] for key in KEYS}


@pytest.mark.parametrize("key", KEYS)
def test_the_curve_is_the_golden_one(key, curve):
    golden = json.loads(GOLDEN.read_text())[key]
    assert len(golden) == 20
    assert curve[key] == pytest.approx(golden, rel=1e-12, abs=0)


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    return train(tmp_path_factory.mktemp("golden") / "run")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(train(Path(scratch) / "run"), indent=1) + "\n")
