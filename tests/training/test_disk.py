"""Disks that are full or read-only, TensorBoard's folder, clocks that jump: a training survives, or says why."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megadit.training.events import EVENTS_FILE
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.launch.environment import lack
from tests.ranks import train_on
from tests.tiers import slow_but

COMMAND = ["--config", "tests/configs/tiny.yaml", "run.dtype=float32", "zero.stage=1"]


@contextmanager
def file_system(folder, options):
    """A small file system of its own."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        lack(f"a file system cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / METRICS_FILE)]


def test_a_run_whose_folder_is_read_only_is_refused_in_one_line(tmp_path):
    with file_system(tmp_path / "disk", "size=1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        for folder in (tmp_path / "disk", tmp_path / "disk" / "run"):
            results = train_on(2, *COMMAND, f"run.dir={folder}")
            assert [status for status, _ in results] == [2, 2]
            spoken = "".join(errors for _, errors in results)
            assert spoken == f"megadit: run.dir={folder} cannot be written: Read-only file system\n"


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_checkpoints_and_not_the_run(tmp_path):
    """The first checkpoint finds room, later ones do not; with room, the same command goes on."""
    folder = tmp_path / "disk" / "run"
    settings = ["run.steps=12", "checkpoint.every=2", "log.tensorboard=true", f"run.dir={folder}"]
    train_on(2, *COMMAND, "run.steps=12", f"run.dir={tmp_path / 'roomy'}")
    with file_system(tmp_path / "disk", "size=6m"):
        results = train_on(2, *COMMAND, *settings)
        assert [status for status, _ in results] == [3, 3]
        messages = [line for line in results[0][1].splitlines() if "No space left" in line]
        assert messages and all("was not saved" in line or "TensorBoard" in line for line in messages)
        saved = [line["step"] for line in events(folder, "save") if line["saved"]]
        failed = [line for line in events(folder, "save") if not line["saved"]]
        assert saved and [line["step"] for line in failed] == list(range(saved[-1] + 2, 13, 2))
        assert all("No space left" in line["reason"] for line in failed)
        assert losses(folder) == losses(tmp_path / "roomy")
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        assert [status for status, _ in train_on(2, *COMMAND, *settings)] == [0, 0]
        assert losses(folder) == losses(tmp_path / "roomy")


def test_lines_that_found_no_room_are_written_when_there_is(tmp_path):
    from megadit.runtime.lines import LineFile, read_lines

    with file_system(tmp_path / "disk", "size=64k"):
        blocker = tmp_path / "disk" / "blocker"
        lines = LineFile(tmp_path / "disk" / "lines.jsonl")
        lines.append({"n": 0, "loss": float("nan")})
        with pytest.raises(OSError, match="No space left"), blocker.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        for n in range(1, 300):  # more than the page that the file has
            lines.append({"n": n, "text": "x" * 40})
        assert 0 < len(read_lines(tmp_path / "disk" / "lines.jsonl")) < 300
        blocker.unlink()
        lines.close()
        found = read_lines(tmp_path / "disk" / "lines.jsonl")
        assert [line["n"] for line in found] == list(range(300)) and found[0]["loss"] is None


@pytest.mark.parametrize("dead", slow_but(["it vanishes"], ["a file is in its place", "it vanishes"]))
def test_tensorboards_folder_is_no_reason_to_stop(dead, tmp_path):
    settings = [*COMMAND, "run.steps=6", f"run.dir={tmp_path}"]
    if dead == "a file is in its place":
        (tmp_path / "tensorboard").write_text("no folder")
        ((status, told),) = train_on(1, *settings, "log.tensorboard=true")
        assert f"{tmp_path / 'tensorboard'}: " in told and "no curves for TensorBoard" in told
    else:
        os.symlink("/proc/self/nowhere", tmp_path / "tensorboard")
        ((status, told),) = train_on(1, *settings, "log.tensorboard=true")
    assert status == 0
    assert len(losses(tmp_path)) == 6


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing_but_the_times_that_are_told(tmp_path):
    """An hour back and forth, during a run: seconds of steps stay positive, nothing hangs, stops or is skipped."""
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None:
        lack("libfaketime is not installed (Debian: faketime)")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    preload = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    environ = os.environ | preload | {"DONT_FAKE_MONOTONIC": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "megadit.train", *COMMAND, "run.steps=40", f"run.dir={tmp_path / 'run'}"]
    training = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        jumps, metrics = 0, tmp_path / "run" / METRICS_FILE
        deadline = time.monotonic() + 120
        while training.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(read_metrics(metrics)) > 0:
                jumps += 1
                clock.write_text("-3600" if jumps % 2 else "+3600")
            time.sleep(0.05)
        _, told = training.communicate(timeout=10)
    finally:
        training.kill()
    assert training.returncode == 0, told
    assert jumps > 2
    lines = read_metrics(metrics)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert all(0 < line["seconds"] < 60 for line in lines)
    train_on(1, *COMMAND, "run.steps=40", f"run.dir={tmp_path / 'steady'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "steady")
