"""A run that is asked to stop saves the step that it is in and says 75; the same command goes on bit for bit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from megadit.runtime.status import STOPPED
from megadit.training.events import EVENTS_FILE
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.launch.environment import environ
from tests.ranks import free_port, train_and_signal, train_on

STEPS = 60
COMMAND = ["--config", "tests/configs/tiny.yaml", f"run.steps={STEPS}", "checkpoint.every=20", "checkpoint.keep=3"]
LAYOUT = ["parallel.expert=2", "zero.stage=1", "run.dtype=float32"]


def steps_done(folder):
    path = folder / METRICS_FILE
    return len(read_metrics(path)) if path.exists() else 0


def events(folder):
    return [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]


def curve(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder / METRICS_FILE)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [status for status, _ in train_on(2, *COMMAND, *LAYOUT, f"run.dir={folder}")] == [0, 0]
    return curve(folder)


def goes_on(folder, expected):
    """The same command finishes the run, as if nothing had happened."""
    assert [status for status, _ in train_on(2, *COMMAND, *LAYOUT, f"run.dir={folder}")] == [0, 0]
    assert curve(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victims"), [("SIGTERM", [0, 1]), ("SIGUSR1", [1])], ids=["all", "one rank"])
def test_asked_during_a_step_it_stops_after_it(number, victims, expected, tmp_path):
    when = lambda: steps_done(tmp_path) >= 5  # noqa: E731
    results = train_and_signal(
        2, when, getattr(signal, number), *COMMAND, *LAYOUT, f"run.dir={tmp_path}", victims=victims
    )
    assert [status for status, _ in results] == [STOPPED, STOPPED]
    done = steps_done(tmp_path)
    assert 5 <= done < 20, "it stopped at the next checkpoint, or the signal came too late"
    *_, asked, saved, stop = events(tmp_path)
    assert [line["event"] for line in (asked, saved, stop)] == ["signal", "save", "stop"]
    assert asked["reason"] in [f"rank {rank}: asked by {number}" for rank in victims]
    assert [line["step"] for line in (asked, saved, stop)] == [done] * 3 and stop["status"] == STOPPED
    assert curve(tmp_path) == expected[:done]
    goes_on(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("background", ["false", "true"], ids=["at once", "background"])
def test_asked_during_a_save_it_finishes_that_and_its_step(background, expected, tmp_path):
    saving = lambda: any((tmp_path / "checkpoints").glob("*.partial"))  # noqa: E731
    arguments = [*LAYOUT, f"run.dir={tmp_path}", f"checkpoint.async={background}"]
    results = train_and_signal(2, saving, signal.SIGTERM, *COMMAND, *arguments)
    assert [status for status, _ in results] == [STOPPED, STOPPED]
    assert [line["step"] for line in events(tmp_path) if line["event"] == "save"][0] == 20
    assert 20 <= steps_done(tmp_path) < STEPS
    assert events(tmp_path)[-1]["event"] == "stop"
    goes_on(tmp_path, expected)


@pytest.mark.slow
def test_the_end_of_its_time_stops_a_run(expected, tmp_path):
    # The process has had its imports and its start before: what it has left is short, but not nothing.
    results = train_on(2, *COMMAND, *LAYOUT, f"run.dir={tmp_path}", "guard.time_limit=0.001")
    assert [status for status, _ in results] == [STOPPED, STOPPED]
    assert "its 0.001 minutes are over" in events(tmp_path)[-1]["reason"]
    assert steps_done(tmp_path) == 1, "at least a step: a limit that is too short does not keep a run where it is"
    goes_on(tmp_path, expected)


def started(rank, folder, port):
    """One process of two; the other may never come."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "megadit.train", *COMMAND, *LAYOUT, f"run.dir={folder}"]
    return subprocess.Popen(command, env=environ(**place), stderr=subprocess.PIPE, text=True)


def listens(port):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_asked_while_it_starts_it_ends_at_once(expected, tmp_path):
    """During its imports, and while it waits in C++ for another process: nothing is there yet."""
    port = free_port()
    importing, waiting = started(0, tmp_path / "a", free_port()), started(0, tmp_path / "b", port)
    try:
        time.sleep(0.5)
        importing.send_signal(signal.SIGTERM)
        _, told = importing.communicate(timeout=20)
        assert importing.returncode == STOPPED
        assert told.splitlines()[-1] == "megadit: asked by SIGTERM before the first step; start again to go on"
        deadline = time.monotonic() + 60
        while not listens(port):
            assert time.monotonic() < deadline and waiting.poll() is None
            time.sleep(0.1)
        before = time.monotonic()
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=20)
        assert waiting.returncode == STOPPED
        assert time.monotonic() - before < 5
    finally:
        importing.kill()
        waiting.kill()
    assert not os.path.exists(tmp_path / "a") and not os.path.exists(tmp_path / "b")
    goes_on(tmp_path / "a", expected)
