"""A score of a run, by the command that users type."""

import json

import pytest
from PIL import Image

from tests.commands import run_python
from tests.ranks import tool_on, train_on

TOOL = "tools/judge_shapes.py"
SHAPES = ["data.kind=shapes", "data.resolution=32", "data.tasks=[colors, position]", "model.image_size=32"]
SMALL = [*SHAPES, "model.channels=3", "model.patch=8", "text.length=24", "text.vocabulary=160", "run.steps=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "run"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", *SMALL)
    return folder


def judge(*argv):
    return run_python(TOOL, *argv)


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


def test_every_layout_judges_the_pictures_of_one_process(trained, tmp_path):
    argv = [trained, "--trained", 2, "--heldout", 0, "--steps", 1, "--guidance-rescale", 0.5, "--batch", 2]
    results = {}
    for name, world_size, layout in (("one", 1, []), ("cut", 2, ["--tensor", 2]), ("shared", 2, [])):
        ended = tool_on(world_size, TOOL, *argv, *layout, "--out", tmp_path / f"{name}.json")
        assert [status for status, *_ in ended] == [0] * world_size, ended[0][2]
        assert [output for _, output, _ in ended[1:]] == [""] * (world_size - 1)
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["one"]["sample"]["guidance_rescale"] == 0.5 and results["one"]["score_heldout"] is None
    assert results["one"] == results["cut"] == results["shared"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tensor", 3], "--tensor 3 does not divide model.heads=4"),
        (["--guidance", -1], "--guidance -1.0 must be 0 or more"),
        (["--out", "{file}/x.json"], "{file}/x.json cannot be written: {file} is not a folder"),
        (["--sheet", "{file}/x.png"], "{file}/x.png cannot be written: {file} is not a folder"),
    ],
)
def test_bad_input_is_heard_on_all_ranks_and_told_by_one(argv, message, trained, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    first, second = tool_on(2, TOOL, trained, *(str(part).format(file=file) for part in argv))
    assert (first[:2], second) == ((2, ""), (2, "", ""))
    assert first[2].startswith(f"judge_shapes: {message.format(file=file)}") and first[2].count("\n") == 1


def test_bad_input_is_one_line(trained, tmp_path):
    digits = tmp_path / "digits"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={digits}", "run.steps=1")
    done = judge(digits)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("is a run on data.kind=digits, and this judge reads shapes alone\n")
    done = judge(trained, "--out", tmp_path / "none.json", "--show")
    assert (done.returncode, done.stdout) == (2, "") and "none.json" in done.stderr
    assert judge(trained, "--trained", 0).returncode == 2
