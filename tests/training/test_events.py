"""The story of a run goes over all its starts, and only the main process tells it."""

import json
import time

import pytest

from megadit.training.events import EVENTS_FILE, Events
from tests.ranks import train_on


def test_a_process_that_is_not_main_tells_nothing(tmp_path):
    events = Events(None)
    events.tell("start", 0, "a new run")
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_it_is(tmp_path):
    events = Events(tmp_path)
    with pytest.raises(TypeError):
        events.tell("start", 0, "a new run", layout=object())
    events.close()
    assert (tmp_path / EVENTS_FILE).read_text() == ""


def test_a_run_tells_each_of_its_starts(tmp_path):
    command = ["--config", "tests/configs/tiny.yaml", "checkpoint.every=2", f"run.dir={tmp_path}"]
    before = time.time()
    train_on(2, *command, "run.steps=3")
    train_on(1, *command, "run.steps=4")
    lines = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [
        *[("start", 0), ("save", 2), ("save", 3), ("finish", 3)],
        *[("resume", 3), ("save", 4), ("finish", 4)],
    ]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert before <= lines[0]["time"] <= time.time()
    assert [line["world_size"] for line in lines if "world_size" in line] == [2, 1]
    assert lines[0]["layout"] == {"pp": 1, "edp": 2, "ep": 1, "tp": 1} and len(lines[0]["hosts"]) == 1
    assert lines[4]["reason"] == "from the checkpoint of step 3"
