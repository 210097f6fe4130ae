"""The tool, on a run that was trained, and on what is none."""

import importlib.util
import subprocess
import sys

import pytest

from megadit.history.story import read_story
from tests.history.made import curve, folder, settings
from tests.page.tree import Tree
from tests.ranks import train_on


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("report", "tools/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    return folder(tmp_path / "run", curve(5), [], settings("mine", 9))


def test_a_trained_run(tool, tmp_path, capsys):
    path = tmp_path / "run"
    command = ["--config", "tests/configs/tiny.yaml", f"run.dir={path}", "run.steps=4", "log.evaluate_every=2"]
    assert [status for status, _ in train_on(1, *command, "model.routing=token_choice")] == [0]
    assert tool.main([str(path), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    tree = Tree((tmp_path / "page.html").read_text(encoding="utf-8")).open[0]
    story = read_story(path)
    assert story.last_step == 4 and list(story.routing["entropy"]) == list(story.loads) == ["1", "3"]
    assert tree.one("h1").text == "tiny"
    (verdict,) = tree.all(class_="verdict")
    assert verdict.text == "Finished: step 4 is done"
    assert {"loss", "gradient", "speed", "routing", "load"} <= {s.attributes["id"] for s in tree.all("section")}
    assert "run.steps: 4" in tree.one("pre").text


def test_what_is_no_run_is_refused_and_nothing_is_written(tool, tmp_path, capsys, run):
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "empty", tmp_path / "none", run / "config.yaml"):
        assert tool.main([str(run), str(bad), "--out", str(tmp_path / "page.html")]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"report: {bad} is no") and said.err.count("\n") == 1 and said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]


def test_a_file_that_cannot_be_read_or_written(tool, tmp_path, capsys, run):
    assert tool.main([str(run), "--out", str(tmp_path / "none" / "page.html")]) == 2
    (tmp_path / "folder").mkdir()
    assert tool.main([str(run), "--out", str(tmp_path / "folder")]) == 2
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert tool.main([str(run), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]


def test_an_older_page_is_replaced_whole(tool, tmp_path, run):
    page = tmp_path / "page.html"
    page.write_text("old")
    assert tool.main([str(run), "--out", str(page)]) == 0
    assert page.read_text(encoding="utf-8").endswith("</html>\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_nobody_waits_for_torch(run, tmp_path):
    """The tool starts at once, also on a machine that is busy training."""
    code = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 0 and 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "tools/report.py", str(run), "--out", str(tmp_path / "page.html")]
    subprocess.run(command, check=True, capture_output=True)
