"""Thirty SIGKILLs of random ranks at random moments: torchrun restarts them, and the run repeats itself to the bit."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.launch.environment import environ

STEPS, RANKS, KILLS = 200, 4, 30
COMMAND = [
    *("tests/configs/tiny.yaml", "run.dtype=float32", "zero.stage=0", "parallel.tensor=2", "parallel.expert=2"),
    *(f"run.steps={STEPS}", "checkpoint.every=2", "log.sample_ids=true"),
]


def torchrun(folder, restarts):
    log = (folder.with_suffix(".log")).open("w")
    return subprocess.Popen(
        ["bash", "examples/launch/torchrun_one_node.sh", *COMMAND, f"run.dir={folder}"],
        env=environ(NPROC=RANKS, MAX_RESTARTS=restarts),
        stdout=log,
        stderr=log,
    )


def ranks_of(agent):
    """The processes that torchrun has started, in the order of their ranks."""
    try:
        return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    except OSError:
        return []


def lines(folder):
    return read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []


@pytest.mark.drill
def test_thirty_kills_under_torchrun_leave_no_trace_in_the_run(tmp_path):
    chance = random.Random("thirty kills")
    assert torchrun(tmp_path / "straight", 0).wait(300) == 0
    expected = lines(tmp_path / "straight")
    folder, killed = tmp_path / "killed", []
    agent = torchrun(folder, KILLS)
    try:
        for left in range(KILLS, 0, -1):
            # A life of its own for each kill: wait for ranks that have not been there before.
            deadline = time.monotonic() + 120
            while not (len(ranks := ranks_of(agent.pid)) == RANKS and not set(ranks) & set(killed)):
                assert agent.poll() is None and time.monotonic() < deadline, tmp_path / "killed.log"
                time.sleep(0.05)
            begun, done = time.monotonic(), len(lines(folder))
            room = (STEPS - 20 - done) // left  # steps for each life, so that none is the last
            if room < 1 or chance.random() < 0.25:  # while it starts
                wait, more = chance.uniform(0, 5), 0
            else:
                wait, more = 0, chance.randint(1, min(12, 2 * room))
            while time.monotonic() < begun + wait or len(lines(folder)) < done + more:
                assert agent.poll() is None and time.monotonic() < begun + 120, tmp_path / "killed.log"
                time.sleep(0.002)
            os.kill(chance.choice(ranks), signal.SIGKILL)
            killed += ranks
        assert agent.wait(300) == 0
    finally:
        agent.terminate()
        agent.wait(60)
    found = lines(folder)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "sample_ids"):
        assert [line[key] for line in found] == [line[key] for line in expected], key
    assert [sample for line in found for sample in line["sample_ids"]] == list(range(16 * STEPS))
