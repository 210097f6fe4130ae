"""A training that is asked to stop through its launcher: it saves, and the same command goes on bit for bit."""

import json
import signal
import subprocess
import time

import pytest

from megadit.runtime.status import STOPPED
from megadit.training.events import EVENTS_FILE
from tests.launch.environment import environ
from tests.ranks import free_port

LIMIT = 300  # seconds


@pytest.mark.drill
@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("torchrun_one_node.sh", signal.SIGTERM),
        ("torchrun_one_node.sh", signal.SIGUSR1),
        ("deepspeed.sh", signal.SIGTERM),
        ("deepspeed.sh", signal.SIGUSR1),
    ],
)
def test_a_signal_to_the_launcher(script, number, training, tmp_path):
    run = tmp_path / "run"

    def start():
        with (tmp_path / "out").open("a") as output:
            command = ["bash", f"examples/launch/{script}", *training.arguments, f"run.dir={run}"]
            return subprocess.Popen(command, stdout=output, stderr=output, env=environ(NPROC=4, PORT=free_port()))

    process = start()
    try:
        deadline = time.monotonic() + LIMIT
        while training.done(run) < 5:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(LIMIT) == 1, (tmp_path / "out").read_text()
        stopped = training.done(run)
        assert stopped < training.steps
        assert (run / "checkpoints/latest").read_text().strip() == f"step_{stopped:08d}", (tmp_path / "out").read_text()
        last = json.loads((run / EVENTS_FILE).read_text().splitlines()[-1])
        assert (last["event"], last["step"], last["status"]) == ("stop", stopped, STOPPED)
        process = start()
        assert process.wait(LIMIT) == 0, (tmp_path / "out").read_text()
    finally:
        process.kill()
        process.wait()
    assert training.curve(run) == training.expected
