"""What is read of a run's folder, and what a damaged one leaves."""

import json
import math

import pytest

from megadit.history.story import CONFIG_FILE, METRICS_FILE, read_story
from tests.history.made import EVERY_EVENT, curve, folder, line, settings


def test_a_whole_run(tmp_path):
    lines = curve(30, load=True)
    lines[11] |= {"loss": math.nan, "skipped": True, "sample_ids": [1, 2]}
    story = read_story(folder(tmp_path / "run", lines, EVERY_EVENT, settings("mine", 100)))
    assert (story.name, story.planned, story.last_step, story.notes) == ("mine", 100, 30, [])
    assert story.curve("loss").steps.tolist() == list(range(1, 31))
    assert story.curve("loss").values[:11].tolist() == [line["loss"] for line in lines[:11]]
    assert math.isnan(story.curve("loss").values[11])
    assert story.curve("heldout_loss").steps.tolist() == [10, 20, 30]
    assert list(story.routing) == ["entropy", "unpicked", "busiest", "picks"]
    assert story.routing["picks"]["3"].values.tolist() == [line["routing"]["3"]["picks"] for line in lines]
    assert story.loads["1"].means(1)[0][2] == pytest.approx([0.1, 1.0, 1.2, 2.6])
    assert story.skipped == {12, 48}
    assert [event.kind for event in story.events] == [event["event"] for event in EVERY_EVENT]
    assert [event.step for event in story.events if event.failed] == [60]
    assert story.events[0].more["layout"] == {"tp": 2, "pp": 1, "ep": 2, "edp": 1}


def test_an_older_run_without_events(tmp_path):
    story = read_story(folder(tmp_path / "run", curve(5)))
    assert story.name == "run" and story.planned is None and story.events == []
    assert any("events.jsonl" in note for note in story.notes) and any("config.yaml" in note for note in story.notes)


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1', "null\n"])
def test_a_run_without_a_step(tmp_path, content):
    path = folder(tmp_path / "run", (), [], settings("mine", 3))
    (path / METRICS_FILE).write_text(content)
    story = read_story(path)
    assert story.last_step == 0 and len(story.curve("loss")) == 0
    assert any("no step" in note for note in story.notes)


def test_a_line_that_a_kill_cut_is_left_out_without_a_word(tmp_path):
    path = folder(tmp_path / "run", curve(5), [], settings("mine", 9))
    for name in (METRICS_FILE, "events.jsonl"):
        with (path / name).open("a") as file:
            file.write('{"step": 6, "lo')
    story = read_story(path)
    assert (story.last_step, story.notes) == (5, [])


def test_lines_that_nobody_writes_are_counted_and_the_rest_is_read(tmp_path):
    path = folder(tmp_path / "run", curve(5), [], settings("mine", 9))
    strange = ["not json", "[1]", '"text"', "[" * 100_000, '{"step": "six"}', '{"step": -1}', '{"loss": 3}', "\x00"]
    with (path / METRICS_FILE).open("a") as file:
        file.write("\n".join(strange) + "\n" + json.dumps(line(6, 1.0) | {"loss": "low", "lr": 10**400}) + "\n")
        file.write('{"step": 7, "routing": {"1": 3, "x": {"picks": null, "load": ["a"]}}, "loss": true}\n')
    (path / "events.jsonl").write_bytes(
        b'{"step": 1e99, "time": "late", "event": ["a"], "reason": null}\n{}\n\xff\xfe\n'
    )
    story = read_story(path)
    assert story.last_step == 7
    assert all(math.isnan(value) for value in story.curve("loss").values[5:])
    assert story.curve("lr").values[5] == math.inf
    assert [(event.kind, event.step, event.time) for event in story.events] == [("['a']", 0, None), ("?", 0, None)]
    assert any(note.startswith("5 lines of metrics.jsonl cannot") for note in story.notes)
    assert any(note.startswith("3 lines of metrics.jsonl have no step") for note in story.notes)


@pytest.mark.parametrize("content", ["{", "- a list", "run: 3", "run: {steps: many, name: [1]}", "\x00", "[" * 20_000])
def test_whatever_the_configuration(tmp_path, content):
    path = folder(tmp_path / "run", curve(3), [])
    (path / CONFIG_FILE).write_text(content)
    story = read_story(path)
    assert story.planned is None and story.last_step == 3
    assert isinstance(story.name, str)


def test_what_is_no_run_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no run: it has neither"):
        read_story(tmp_path / "empty")
    with pytest.raises(ValueError, match="none is not a folder"):
        read_story(tmp_path / "none")


def test_files_are_called_as_the_training_calls_them():
    from megadit.training import config, metrics

    assert (METRICS_FILE, CONFIG_FILE) == (metrics.METRICS_FILE, config.CONFIG_FILE)
