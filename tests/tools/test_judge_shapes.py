"""A score of a run, by the command that users type."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.ranks import train_on

SHAPES = ["data.kind=shapes", "data.resolution=32", "data.tasks=[colors, position]", "model.image_size=32"]
SMALL = [*SHAPES, "model.channels=3", "model.patch=8", "text.length=24", "text.vocabulary=160", "run.steps=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "run"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", *SMALL)
    return folder


def judge(*argv):
    command = [sys.executable, "tools/judge_shapes.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_score_is_by_task_and_kind_and_can_be_shown_again(trained, tmp_path):
    sheet = tmp_path / "sheet.png"
    done = judge(trained, "--trained", 4, "--heldout", 2, "--steps", 1, "--sheet", sheet)
    assert done.returncode == 0, done.stderr
    result = json.loads((trained / "shapes.json").read_text())
    counts = {task: {kind: count["asked"] for kind, count in of.items()} for task, of in result["tasks"].items()}
    assert counts == {task: {"trained": 4, "heldout": 2} for task in ("colors", "position")}
    assert (result["step"], result["seed"], result["sample"]["steps"]) == (1, 1, 1)
    assert result["score"] == 0, "a network of one step draws noise"
    assert done.stdout.splitlines()[-1] == "score: 0.000; held-out combinations: 0.000"
    with Image.open(sheet) as picture:
        assert picture.mode == "RGB"
    shown = judge(trained, "--show")
    assert (shown.returncode, shown.stdout) == (0, done.stdout)


def test_bad_input_is_one_line(trained, tmp_path):
    digits = tmp_path / "digits"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={digits}", "run.steps=1")
    done = judge(digits)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("is a run on data.kind=digits, and this judge reads shapes alone\n")
    done = judge(trained, "--out", tmp_path / "none.json", "--show")
    assert (done.returncode, done.stdout) == (2, "") and "none.json" in done.stderr
    assert judge(trained, "--trained", 0).returncode == 2
