"""Heat maps of a routing, by the command that users type."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from megadit.sampling.evenness import evenness
from tests.commands import run_python
from tests.ranks import train_on
from tools import heatmap as tool


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heatmap") / "run"
    overrides = ["run.steps=60", "optim.lr=0.01", "ema.decay=0.9"]
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", *overrides)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heatmap") / "dense"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=1", "model.experts=0")
    return folder


def heatmap(*argv):
    return run_python("tools/heatmap.py", *argv)


def frames_of(path):
    with Image.open(path) as picture:
        return picture.n_frames


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """(what the command printed, its folder) for a named PNG in a new folder."""
    folder = tmp_path_factory.mktemp("out") / "new"
    done = heatmap(trained, "a handwritten seven", "--steps", 3, "--out", folder / "seven.png")
    assert done.returncode == 0, done.stderr
    return done, folder


def test_it_writes_a_sheet_an_animation_and_the_table_and_prints_it(drawn):
    done, folder = drawn
    assert sorted(path.name for path in folder.iterdir()) == ["seven.csv", "seven.gif", "seven.json", "seven.png"]
    head, *rows, png, gif, table, json_ = done.stdout.splitlines()
    assert [png, gif, table, json_] == [str(folder / f"seven.{ending}") for ending in ("png", "gif", "csv", "json")]
    assert head.split()[:4] == ["layer", "mean", "most", "cv"]
    assert {row.split()[0] for row in rows} == {"1", "3"}
    cvs = [float(row.split()[3]) for row in rows]
    assert cvs == sorted(cvs, reverse=True)
    assert frames_of(folder / "seven.gif") == 3 + 1
    assert all(re.search(f"{what}.*100%", done.stderr) for what in ("drawing", "decoding", "animation"))
    with Image.open(folder / "seven.png") as sheet:
        # Columns for three steps and the mean; cells of 128 pixels.
        assert sheet.size[0] == 24 + 280 + 96 + 4 * (128 + 8) - 8 + 24


def test_the_numbers_are_those_of_the_maps_in_the_json(drawn):
    folder = drawn[1]
    content = json.loads((folder / "seven.json").read_text())
    assert (content["prompt"], content["experts"], content["grid"], content["branch"]) == (
        *("a handwritten seven", 4, [4, 4]),
        "conditional",
    )
    assert content["sample"]["steps"] == 3
    with (folder / "seven.csv").open(newline="") as file:
        rows = {int(row["layer"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {1, 3}
    for layer, row in rows.items():
        steps = content["steps"][str(layer)]
        assert [step["time"] for step in steps] == pytest.approx([1, 2 / 3, 1 / 3])
        each = [evenness(np.array(step["takers"])) for step in steps]
        assert all(sum(step["takers"]) == 4 * 8 for step in steps), "four experts, each 16 x 2 / 4 patches"
        assert float(row["cv"]) == pytest.approx(np.mean([one.cv for one in each]))
        assert float(row["most"]) == max(one.most for one in each)


def test_branches_layers_and_kinds_are_chosen(trained, tmp_path):
    seen = {}
    for branch in ("conditional", "unconditional", "difference"):
        out = tmp_path / branch
        options = ["--sampler", "euler", "--steps", 4, "--layers", 1, "--animation", "webp", "--branch", branch]
        done = heatmap(trained, "the digit 2", *options, "--plain", "--steps-shown", 1, "--out", out)
        assert done.returncode == 0, done.stderr
        assert sorted(path.suffix for path in out.iterdir()) == [".csv", ".json", ".png", ".webp"]
        content = json.loads((out / "heatmap.json").read_text())
        assert list(content["steps"]) == ["1"] and content["layers"][0]["differs"] > 0
        assert frames_of(out / "heatmap.webp") == 5
        seen[branch] = [step["takers"] for step in content["steps"]["1"]], (out / "heatmap.png").read_bytes()
    assert seen["difference"][0] == seen["conditional"][0] != seen["unconditional"][0]
    assert len({sheet for _, sheet in seen.values()}) == 3


def test_another_seed_has_other_maps_and_without_an_out_they_lie_in_the_run(trained):
    written = []
    for seed in (1, 2):
        done = heatmap(trained, "the digit 2", "--seed", seed, "--steps", 1, "--size", "8x16", "--animation", "none")
        assert done.returncode == 0, done.stderr
        content = json.loads((trained / "heatmap.json").read_text())
        assert content["grid"] == [4, 8]
        assert "the model was not trained on pictures of 8x16, but of 8x8; expect worse ones" in done.stderr
        written.append(content["steps"])
        assert not (trained / "heatmap.gif").exists()
    assert written[0] != written[1]


def test_steps_without_guidance_have_no_maps_of_the_other_branch(trained, tmp_path):
    argv = [trained, "the digit 2", "--steps", 4, "--sampler", "euler", "--branch", "difference", "--animation", "none"]
    done = heatmap(*argv, "--guidance-interval", 0.4, 0.8, "--out", tmp_path / "some")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "some/heatmap.json").read_text())
    assert content["sample"]["guidance_until"] == 0.8 and content["layers"][0]["differs"] > 0
    # Heun's second call, at the picture, is guided; no step begins there.
    argv[3:6] = 1, "--sampler", "heun"
    done = heatmap(*argv, "--guidance-interval", 0, 0.1, "--out", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("heatmap: there is no difference branch: no step is drawn without")
    assert "drawing:" not in done.stderr


@pytest.mark.slow
def test_two_processes_write_the_same_numbers(trained, drawn, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "tools/heatmap.py", trained, "a handwritten seven", "--steps", 3, "--pipeline", 2]
    argv = map(str, [*command, "--animation", "none", "--out", tmp_path / "seven.png"])
    done = subprocess.run(list(argv), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written, wanted = (json.loads((folder / "seven.json").read_text()) for folder in (tmp_path, drawn[1]))
    assert written == wanted
    assert done.stderr.count("drawing:   0%") == 1, "one rank speaks"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "2,3"], "heatmap: --layers 2: that layer has no experts; those of this run have: 1, 3\n"),
        (["--size", "7x8"], "heatmap: --size 7x8 must be multiples of 2 pixels\n"),
        (["--guidance", "-1"], "heatmap: --guidance -1.0 must be 0 or more\n"),
        (
            ["--guidance", "1", "--branch", "unconditional"],
            "heatmap: there is no unconditional branch: no step is drawn without the prompt; set a guidance other "
            "than 1, between times that steps begin at\n",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(options, message, trained, tmp_path):
    done = heatmap(trained, "the digit 2", "--steps", 1, "--out", tmp_path / "new", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines(keepends=True)[-1] == message and "drawing:" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_another_suffix_is_refused_unless_it_is_a_folders(tmp_path, capsys, monkeypatch):
    (tmp_path / "there.v2").mkdir()
    (tmp_path / "there.png").mkdir()
    for out in ("new", "new/seven.png", "there.v2", "new.v2/", ".hidden"):
        monkeypatch.setattr(sys, "argv", ["heatmap", "run", "a", "--out", f"{tmp_path}/{out}"])
        assert tool.arguments().out == tmp_path / out
    for out, why in (("seven.jpg", "is no PNG, nor a folder that is there"), ("there.png", "is a folder; name a file")):
        monkeypatch.setattr(sys, "argv", ["heatmap", "run", "a", "--out", f"{tmp_path}/{out}"])
        with pytest.raises(SystemExit):
            tool.arguments()
        assert f"argument --out: {tmp_path}/{out} {why}" in capsys.readouterr().err


def test_a_dense_model_is_refused_by_the_key(dense, tmp_path):
    done = heatmap(dense, "the digit 2", "--out", tmp_path / "new")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("heatmap: no layer of this model has experts (model.experts=0)")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(trained, tmp_path):
    (tmp_path / "file").write_text("")
    done = heatmap(trained, "the digit 2", "--out", tmp_path / "file" / "seven.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"heatmap: --out: {tmp_path / 'file'}: File exists\n"


def test_the_help_shows_commands():
    done = heatmap("--help")
    assert done.returncode == 0 and 'python tools/heatmap.py runs/digits "a handwritten seven"' in done.stdout
