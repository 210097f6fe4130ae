"""The judge reads real scans right, notices copies, and is not fooled by noise or by wrong labels."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from megadit.data.digits import Digits
from tests.ranks import train_on
from tests.tools.test_judge_shapes import SMALL


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("judge_digits", "tools/judge_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def heldout():
    return Digits("heldout")


def test_heldout_scans_are_read_right_and_are_as_far_as_heldout_scans(tool, heldout):
    result = tool.judge(heldout.images_NCHW, heldout.labels_N.numpy())
    assert result["read_as_prompted"] >= 0.97
    assert result["read_as_prompted"] == result["reader_accuracy_on_heldout_scans"]
    assert result["distance_ratio"] == 1
    assert result["samples"] == 359
    shares = heldout.labels_N.bincount().numpy() / 359
    assert sum(result["per_digit"][str(d)] * shares[d] for d in range(10)) == pytest.approx(result["read_as_prompted"])


def test_copies_of_training_scans_show(tool):
    train = Digits("train")
    result = tool.judge(train.images_NCHW[:100], train.labels_N[:100].numpy())
    assert result["distance_ratio"] == pytest.approx(0, abs=1e-6)
    assert result["read_as_prompted"] >= 0.97, "copies are read right: only the ratio tells"


def test_noise_is_read_at_chance_and_is_far_from_any_scan(tool):
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = tool.judge(noise, np.arange(500) % 10)
    assert result["read_as_prompted"] == pytest.approx(0.1, abs=0.05)
    assert result["distance_ratio"] > 1.5


def test_wrong_labels_lower_the_score(tool, heldout):
    labels = heldout.labels_N.numpy()
    half = np.where(np.arange(len(labels)) % 2 == 0, labels, (labels + 1) % 10)
    right, partly, wrong = (
        tool.judge(heldout.images_NCHW, wanted)["read_as_prompted"] for wanted in (labels, half, (labels + 1) % 10)
    )
    assert partly == pytest.approx(right / 2, abs=0.02)
    assert wrong < 0.02


def test_only_the_digits_that_were_asked_for_are_listed(tool, heldout):
    assert tool.judge(heldout.images_NCHW[:20], np.full(20, 3))["per_digit"].keys() == {"3"}


def test_ink_is_the_scans_own_scale_and_what_is_outside_is_clipped(tool):
    ink = tool.to_ink(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 9.0]).view(6, 1, 1, 1))
    assert ink.ravel().tolist() == [0, 0, 8, 12, 16, 16]


def run_tool(tool, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["judge_digits", *map(str, argv)])
    return tool.main()


def test_show_of_a_result_that_is_not_there_is_refused(tool, monkeypatch, capsys, tmp_path):
    assert run_tool(tool, monkeypatch, tmp_path, "--show") == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert str(tmp_path / "result.json") in errors


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_show_of_a_broken_result_is_refused(content, tool, monkeypatch, capsys, tmp_path):
    (tmp_path / "result.json").write_text(content)
    assert run_tool(tool, monkeypatch, tmp_path, "--show") == 2
    assert str(tmp_path / "result.json") in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tool, monkeypatch, capsys, tmp_path):
    assert run_tool(tool, monkeypatch, tmp_path) == 2
    assert str(tmp_path / "config.yaml") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_other_data_is_refused(tool, monkeypatch, capsys, tmp_path):
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={tmp_path / 'run'}", *SMALL)
    assert run_tool(tool, monkeypatch, tmp_path / "run", "--samples", 10) == 2
    assert "data.kind=shapes, and this judge reads digits alone" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()


RUNS = {
    "captions": [],
    # Told the digits; the four images of a microbatch compete.
    "classes": ["model.conditioning=class", "model.classes=10", "model.routing_group=batch"],
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "run"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=1", *RUNS[request.param])
    return folder


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(tool, monkeypatch, trained):
    judged = []
    monkeypatch.setattr(
        tool, "judge", lambda images, wanted, judge=tool.judge: judged.append(images) or judge(images, wanted)
    )
    for chunk in (20, 8, 6):
        monkeypatch.setattr(tool, "PICTURES_PER_CALL", chunk)
        assert run_tool(tool, monkeypatch, trained, "--samples", 20) == 0
    assert judged[0].shape == (20, 1, 8, 8)
    torch.testing.assert_close(judged[1], judged[0])
    torch.testing.assert_close(judged[2], judged[0])
    assert (trained / "result.json").exists()


def test_a_run_is_judged_and_shown_again(tool, monkeypatch, capsys, tmp_path, trained):
    out = tmp_path / "out.json"
    assert run_tool(tool, monkeypatch, trained, "--samples", 20, "--out", out) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert (result["step"], result["samples"]) == (1, 20)
    assert printed.splitlines()[-1] == f"read as prompted: {result['read_as_prompted']:.3f} (n=20)"
    assert run_tool(tool, monkeypatch, trained, "--out", out, "--show") == 0
    assert capsys.readouterr().out == printed
