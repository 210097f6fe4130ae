"""Loss curves in one figure."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

from megadit.training.metrics import METRICS_FILE


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plot_loss", "tools/plot_loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_folder(tmp_path):
    def make(name, steps=30, heldout_every=10):
        lines = [{"step": step, "loss": 2 / step} for step in range(1, steps + 1)]
        for line in lines[heldout_every - 1 :: heldout_every]:
            line["heldout_loss"] = line["loss"] + 0.1
        folder = tmp_path / name
        folder.mkdir()
        (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


@pytest.mark.parametrize("window", [1, 3, 50])
def test_smoothing_is_a_running_mean_that_is_shorter_at_the_start(window, tool):
    values = np.random.default_rng(0).normal(size=20)
    expected = [values[max(0, i + 1 - window) : i + 1].mean() for i in range(20)]
    np.testing.assert_allclose(tool.smooth(values, window), expected, rtol=1e-12)


def run_tool(tool, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["plot_loss", *map(str, argv)])
    return tool.main()


def test_each_run_has_its_curves_and_its_heldout_points(tool, monkeypatch, capsys, tmp_path, run_folder):
    out = tmp_path / "loss.png"
    figures = []
    monkeypatch.setattr(
        tool.plt, "subplots", lambda original=tool.plt.subplots, **keys: figures.append(original(**keys)) or figures[-1]
    )
    assert run_tool(tool, monkeypatch, run_folder("a"), run_folder("b", heldout_every=99), "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert min(picture.size) > 400
    ((_, axes),) = figures
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "a: training",
        "a: held out (EMA)",
        "b: training",
    ]
    raw, smoothed, heldout = axes.lines[:3]
    assert raw.get_ydata().tolist() == [2 / step for step in range(1, 31)]
    assert smoothed.get_ydata()[-1] == pytest.approx(np.mean(raw.get_ydata()))
    assert list(heldout.get_xdata()) == [10, 20, 30]


def test_a_folder_without_metrics_is_refused_by_name(tool, monkeypatch, capsys, tmp_path, run_folder):
    assert run_tool(tool, monkeypatch, run_folder("a"), tmp_path / "none", "--out", tmp_path / "loss.png") == 2
    assert f"{tmp_path / 'none' / METRICS_FILE}: No such file" in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()
