"""metrics.jsonl: what is written reads back, and a restart leaves no trace of steps that did not last."""

import dataclasses
import json
import math
import struct

import pytest

from megadit.training.metrics import METRICS_FILE, Recorder, read_metrics
from megadit.training.step import StepReport


def report(step, loss=None):
    routing = {1: {"unpicked": 0.25, "entropy": step / 3}}
    return StepReport(step, 1 / step if loss is None else loss, math.sqrt(step), 1e-4 / 3, False, routing)


def record(folder, start, last, tensorboard=False, steps=10):
    recorder = Recorder(folder, start, steps, tensorboard)
    for step in range(start + 1, last + 1):
        recorder.record(report(step), seconds=0.1 * step)
    recorder.close()


def test_a_line_holds_the_report_and_what_was_measured(tmp_path):
    record(tmp_path, 0, 2)
    expected = dataclasses.asdict(report(2)) | {"seconds": 0.2, "routing": {"1": report(2).routing[1]}}
    assert read_metrics(tmp_path / METRICS_FILE)[1] == expected


@pytest.mark.parametrize("loss", [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, 1 + 2**-52, -0.0])
def test_floats_keep_all_their_digits(loss, tmp_path):
    recorder = Recorder(tmp_path, 0, 1, tensorboard=False)
    recorder.record(report(1, loss))
    recorder.close()
    (line,) = read_metrics(tmp_path / METRICS_FILE)
    assert struct.pack("d", line["loss"]) == struct.pack("d", loss)


def test_a_loss_that_is_not_a_number_is_recorded_as_null(tmp_path):
    recorder = Recorder(tmp_path, 0, 1, tensorboard=False)
    recorder.record(report(1, math.nan))
    recorder.close()
    assert json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=pytest.fail)["loss"] is None


def test_each_line_is_on_disk_as_soon_as_it_is_recorded(tmp_path):
    recorder = Recorder(tmp_path, 0, 3, tensorboard=False)
    for step in (1, 2):
        recorder.record(report(step))
        assert len(read_metrics(tmp_path / METRICS_FILE)) == step
    recorder.close()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    record(tmp_path, 0, 7)
    before = (tmp_path / METRICS_FILE).read_text().splitlines()
    record(tmp_path, 4, 5)
    assert (tmp_path / METRICS_FILE).read_text().splitlines() == before[:5]


def test_a_run_that_starts_anew_drops_every_line(tmp_path):
    record(tmp_path, 0, 7)
    record(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1]


@pytest.mark.parametrize("kept", [0, 1, -2, -1])  # bytes of the last line that a kill let through
def test_a_last_line_that_was_cut_short_is_left_out_and_written_again(kept, tmp_path):
    record(tmp_path, 0, 3)
    path = tmp_path / METRICS_FILE
    whole = path.read_text()
    first, second, third = whole.splitlines(keepends=True)
    path.write_text(first + second + third[:kept])
    # Cut by its line feed alone it is whole.
    assert [line["step"] for line in read_metrics(path)] == ([1, 2, 3] if kept == -1 else [1, 2])
    record(tmp_path, 2, 3)
    assert path.read_text() == whole


def test_every_line_is_strict_json_of_one_line(tmp_path):
    record(tmp_path, 0, 3)
    for text in (tmp_path / METRICS_FILE).read_text().splitlines():
        assert json.loads(text)["step"] >= 1


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_same_curves_and_a_restart_replaces_them(tmp_path):
    record(tmp_path, 0, 6, tensorboard=True)
    record(tmp_path, 3, 5, tensorboard=True)
    found = scalars(tmp_path)
    assert found.keys() == {
        *("loss", "grad_norm", "lr", "seconds"),
        *("routing/unpicked/layer_1", "routing/entropy/layer_1"),
    }
    lines = read_metrics(tmp_path / METRICS_FILE)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for key in ("loss", "grad_norm", "lr", "seconds"):
        assert [step for step, _ in found[key]] == [1, 2, 3, 4, 5]
        assert [value for _, value in found[key]] == pytest.approx([line[key] for line in lines], rel=1e-6)
    assert [value for _, value in found["routing/entropy/layer_1"]] == pytest.approx([i / 3 for i in range(1, 6)])


def test_without_tensorboard_there_are_no_events(tmp_path):
    record(tmp_path, 0, 2)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
