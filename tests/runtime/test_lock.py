"""The lock of a run's folder, between real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megadit.runtime.lock import hold
from megadit.training.metrics import METRICS_FILE, read_metrics

HOLDER = """
import sys, time
from pathlib import Path
from megadit.runtime.lock import hold
held = hold(Path(sys.argv[1]), 0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_that_is_held_is_refused_by_name(holder, tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {holder.pid} on .*; stop that"):
        hold(tmp_path / "lock", 0.1)


def test_a_killed_holder_lets_go(holder, tmp_path):
    holder.kill()
    holder.wait()
    hold(tmp_path / "lock", 0).close()
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.slow
def test_ranks_end_with_a_killed_torchrun_and_the_run_goes_on(tmp_path):
    """torchrun is killed, not its ranks: they must not train on beside the run that is started next."""
    folder, metrics = tmp_path / "run", tmp_path / "run" / METRICS_FILE
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megadit.train", "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "checkpoint.every=5"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    launcher = subprocess.Popen([*command, "run.steps=100000"], env=environ, **quiet)
    deadline = time.monotonic() + 90
    while not (metrics.exists() and len(read_metrics(metrics)) > 10):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    hold(folder / "lock", 10).close()  # rank 0 has ended
    steps = read_metrics(metrics)[-1]["step"] + 5
    subprocess.run([*command, f"run.steps={steps}"], env=environ, check=True, timeout=90, **quiet)
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, steps + 1))
