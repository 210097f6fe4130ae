"""Judging a run, by the commands that users type."""

import contextlib
import io
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.evaluation.distances import frechet, kernel
from megadit.evaluation.features import open_extractor
from megadit.evaluation.images import open_rgb
from megadit.runtime.launch import Process
from megadit.runtime.tool import answered
from megadit.sampling.options import spoken
from tests.commands import run_python
from tests.evaluation.judges import make_clip, make_dinov2
from tests.evaluation.test_geneval import LINES, write_results
from tests.ranks import run_ranks, train_on
from tests.tiers import slow_but
from tools import evaluate as tool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    few = ["run.steps=2", "optim.lr=0.02", "optim.warmup=1"]
    for name, overrides in {"text": [], "class": ["model.conditioning=class", "model.classes=10"]}.items():
        train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={root / name}", *few, *overrides)
    return root


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    return {"clip": make_clip(root / "clip"), "dinov2": make_dinov2(root / "dinov2")}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of pictures, of several sizes."""
    root, draw = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, count, low in (("real", 50, 0), ("drawn", 45, 90)):
        (root / name).mkdir()
        for i in range(count):
            pixels = draw.integers(low, 256, (16 + i % 3, 20, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def run_tool(*argv):
    return run_python("tools/evaluate.py", *argv)


def on_rank(rank, world_size, argv):
    """(exit status, stderr) of the command on a rank that was started."""
    args, errors = tool.make_parser().parse_args(argv), io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = answered("evaluate", Process(rank, world_size, rank, CPU), partial(tool.judge, args), spoken)
    return status, errors.getvalue()


def on_ranks(world_size, *argv):
    """The exit status on each rank."""
    return [status for status, _ in run_ranks(on_rank, world_size, [str(one) for one in argv])]


def features(extractor, folder):
    return extractor.extract([open_rgb(path) for path in sorted(folder.iterdir())])


def test_help_teaches_every_command():
    done = run_tool("--help")
    assert done.returncode == 0
    commands = ("geneval", "dpg", "check-geneval", "summary", "fid", "kid", "clip-score", "heldout")
    for command in commands:
        assert re.search(rf"^    {command}\b", done.stdout, re.MULTILINE), command
        with pytest.raises(SystemExit) as ended:
            tool.make_parser().parse_args([command, "--help"])
        assert ended.value.code == 0


def test_distances_between_folders_are_those_of_their_features(sets, judges, tmp_path):
    extractor = open_extractor(judges["dinov2"], CPU)
    real, drawn = (features(extractor, sets / name) for name in ("real", "drawn"))
    out = tmp_path / "fid.json"
    done = run_tool("fid", sets / "real", sets / "drawn", "--features", judges["dinov2"], "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["fid"] == pytest.approx(frechet(real, drawn), rel=1e-4)
    assert (found["real_images"], found["drawn_images"], found["features"]["width"]) == (50, 45, 32)
    assert found["warnings"] == []
    assert {"torch", "torchmetrics", "transformers"} <= found["versions"].keys()
    assert done.stdout.splitlines()[-1] == found["line"]
    assert found["line"].endswith("(50 real and 45 drawn images, Dinov2Model, 32 features)")
    assert on_ranks(2, "kid", sets / "real", sets / "drawn", "--features", judges["clip"], "--json", out) == [0, 0]
    extractor = open_extractor(judges["clip"], CPU)
    expected = kernel(*(features(extractor, sets / name) for name in ("real", "drawn")))
    found = json.loads(out.read_text())
    assert found["kid"] == pytest.approx(expected.mean, rel=1e-3)
    assert (found["subsets"], found["subset_size"]) == (100, 45)


def test_fid_of_few_images_warns(sets, judges, tmp_path, monkeypatch):
    (tmp_path / "few").mkdir()
    for i in range(5):
        (tmp_path / f"few/{i}.png").write_bytes((sets / f"drawn/00{i}.png").read_bytes())
    monkeypatch.chdir(tmp_path / "few")  # a folder without a name has its result beside it, too
    assert on_ranks(1, "fid", sets / "real", ".", "--features", judges["dinov2"]) == [0]
    found = json.loads((tmp_path / "few.fid.json").read_text())
    (warning,) = found["warnings"]
    assert warning.startswith("5 drawn images are fewer than the 32 features")


@pytest.mark.parametrize("conditioning", slow_but(["text"], ["text", "class"]))
def test_fid_of_a_run_is_alike_at_one_rank_and_several(conditioning, trained, judges, tmp_path):
    run = trained / conditioning
    found = {}
    for world_size, layout in ((1, []), (2, []), (2, ["--pipeline", 2])):
        out = tmp_path / "fid.json"
        command = ["fid", run, "--features", judges["dinov2"], "--samples", 40, "--json", out, *layout]
        assert set(on_ranks(world_size, *command)) == {0}
        found[(world_size, *layout)] = json.loads(out.read_text())
    first = found[(1,)]
    assert (first["real_images"], first["drawn_images"]) == (359, 40)
    drawn = first["settings"]["drawn"]
    assert (drawn["run"], drawn["step"], drawn["seed"], drawn["steps"]) == (str(run), 2, 0, 2)
    for other in found.values():
        assert other["fid"] == pytest.approx(first["fid"], rel=1e-3), "a byte may be rounded the other way"


def test_a_clip_score_of_a_folder_of_genevals_folder_and_of_a_run(sets, judges, trained, tmp_path):
    """GenEval's folder holds the same pictures and captions as the plain one."""
    for i in range(4):
        picture = (sets / f"real/00{i}.png").read_bytes()
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / f"plain/{i}.png").write_bytes(picture)
        (tmp_path / f"plain/{i}.txt").write_text(json.loads(LINES[i // 2])["prompt"] + "\n")
        samples = tmp_path / f"geneval/0000{i // 2}/samples"
        samples.mkdir(parents=True, exist_ok=True)
        (samples / f"000{i % 2}.png").write_bytes(picture)
        (samples.parent / "metadata.jsonl").write_text(LINES[i // 2])
    scores = {}
    for name, world_size in (("plain", 1), ("geneval", 2)):
        out = tmp_path / f"{name}.json"
        command = ("clip-score", tmp_path / name, "--clip", judges["clip"], "--json", out)
        assert set(on_ranks(world_size, *command)) == {0}
        scores[name] = json.loads(out.read_text())
    assert scores["plain"]["images"] == scores["geneval"]["images"] == 4
    assert scores["plain"]["clip_score"] == pytest.approx(scores["geneval"]["clip_score"], rel=1e-4, abs=1e-4)
    assert on_ranks(2, "clip-score", trained / "text", "--clip", judges["clip"], "--samples", 5) == [0, 0]
    found = json.loads((trained / "text/clip_score.json").read_text())
    assert found["images"] == 5 and found["settings"]["drawn"]["step"] == 2


def test_a_clip_score_of_other_prompts_needs_no_held_out_images(trained, judges, tmp_path):
    (tmp_path / "prompts.txt").write_text("a seven\nthe digit two\n")
    run = shutil.copytree(trained / "text", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert "kind: digits" in config
    (run / "config.yaml").write_text(config.replace("kind: digits", "kind: arrays"))  # of a file that is not there
    command = ["clip-score", run, "--clip", judges["clip"], "--steps", 1]
    assert on_ranks(1, *command) == [2]
    assert on_ranks(1, *command, "--prompts", tmp_path / "prompts.txt") == [0]
    assert json.loads((run / "clip_score.json").read_text())["images"] == 2


def test_heldout_writes_a_table_a_result_and_a_plot(trained, tmp_path):
    done = run_tool("heldout", trained / "text", "--bins", 2, "--plot", tmp_path / "loss.png")
    assert done.returncode == 0, done.stderr
    found = json.loads((trained / "text/heldout.json").read_text())
    assert [one["count"] for one in found["bins"]] == [359, 359]
    assert found["loss_uniform"] == pytest.approx(np.mean([one["loss"] for one in found["bins"]]))
    assert (found["settings"]["step"], found["settings"]["seed"]) == (2, 0)
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and lines[-1] == found["line"] and lines[-2] == str(trained / "text/heldout.json")
    with Image.open(tmp_path / "loss.png") as picture:
        assert min(picture.size) > 300


def test_geneval_is_drawn_checked_and_its_results_read(trained, tmp_path):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("\n".join(LINES) + "\n")
    command = ("geneval", trained / "text", "--prompts", prompts, "--out", tmp_path / "out", "--steps", 1)
    done = run_tool(*command, "--size", "8x12")
    assert done.returncode == 0, done.stderr
    assert "the model was not trained on pictures of 8x12, but of 8x8; expect worse ones" in done.stderr
    assert "3 prompts (single_object 1, counting 1, position 1)" in done.stdout
    check = run_tool("check-geneval", tmp_path / "out", "--prompts", prompts)
    assert (check.returncode, check.stdout.count("\n")) == (0, 1), check.stdout
    (tmp_path / "out/00001/samples/0003.png").unlink()
    check = run_tool("check-geneval", tmp_path / "out")
    assert check.returncode == 1
    assert check.stdout.startswith(f"{tmp_path / 'out/00001/samples'}: pictures must be numbered 0000.png to 0003.png")
    results = write_results(tmp_path / "results.jsonl", dict.fromkeys(tool.geneval.TASKS, (1, 4)))
    done = run_tool("summary", results, "--json", tmp_path / "scores.json")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "GenEval overall (mean of 6 tasks): 0.2500")
    assert json.loads((tmp_path / "scores.json").read_text())["overall"] == 0.25


def without_a_plot(rank, world_size, argv):
    """As `on_rank`, where the plot cannot be written in the end."""

    def save_plot(*_):
        raise ValueError("no room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.heldout, "save_plot", save_plot)
        return on_rank(rank, world_size, argv)


def test_the_held_out_losses_are_written_before_their_plot(trained, tmp_path):
    out, plot = tmp_path / "heldout.json", tmp_path / "loss.png"
    argv = ["heldout", trained / "text", "--bins", 2, "--json", out, "--plot", plot]
    ((status, errors),) = run_ranks(without_a_plot, 1, [str(one) for one in argv])
    assert status == 2 and "evaluate: no room" in errors
    assert len(json.loads(out.read_text())["bins"]) == 2 and not plot.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("heldout runs/x --plot loss.pdf", "argument --plot: loss.pdf does not end in .png"),
        ("kid a b --features c --subset-size 1", "argument --subset-size: 1 is not more than 1"),
        ("check-geneval drawn --json x.json", "unrecognized arguments: --json x.json"),
    ],
)
def test_values_that_cannot_be_are_refused_at_once(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.make_parser().parse_args(argv.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_batch_of_the_held_out_loss_is_of_held_out_images(capsys):
    with pytest.raises(SystemExit):
        tool.make_parser().parse_args(["heldout", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--batch BATCH held-out images that a" in told and "guidance" not in told


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("heldout {none}", "config.yaml"),
        ("heldout {text} --tensor 3", "--tensor 3 does not divide"),
        ("heldout {text} --pipeline 2 --schedule interleaved --stages-per-rank 3", "--pipeline 2 x 3 stages"),
        ("heldout {text} --json {prompts}/x.json", "x.json cannot be written: .*prompts.jsonl is not a folder"),
        ("heldout {text} --plot {prompts}/x.png", "x.png cannot be written: .*prompts.jsonl is not a folder"),
        ("geneval {text} --prompts {prompts} --out {out} --guidance-interval 0.6 0.3", "--guidance-interval 0.6 0.3"),
        ("geneval {text} --prompts {prompts} --out {out} --size 9x8", "--size 9x8 must be multiples of 2 pixels"),
        ("geneval {text} --prompts {none} --out {out}", "none: No such file"),
        ("geneval {class} --prompts {prompts} --out {out}", "is told classes"),
        ("dpg {text} --prompts {none} --out {out}", "none: No such file"),
        ("dpg {none} --prompts {none} --out {prompts}", "--out .*prompts.jsonl is a file; name a folder"),
        ("geneval {none} --prompts {none} --out {prompts}", "--out .*prompts.jsonl is a file; name a folder"),
        ("geneval {none} --prompts {none} --out {prompts}/x", "x cannot be written: .*prompts.jsonl is not a folder"),
        ("check-geneval {none}", "none: No such file"),
        ("summary {none}", "none: No such file"),
        ("fid {sets} --features {dinov2}", "is no run .*of images, give two folders"),
        ("fid {real} {none} --features {dinov2}", "none: No such file"),
        ("fid {real} {sets} --features {dinov2}", "no images in it"),
        ("fid {real} {bad} --features {dinov2}", "bad/1.png cannot be used"),
        ("fid {real} {real} {real} --features {dinov2}", "3 folders"),
        ("fid {real} {text} --features {dinov2}", "text is a run, not a set of pictures: give it alone to judge what"),
        ("kid {class} {real} --features {dinov2}", "class is a run, not a set .* as tools/sample.py --folder writes"),
        ("fid {real} {real} --features {none}", "none: neither the folder"),
        ("clip-score {real} --clip {clip}", "000.png has no caption: 000.txt"),
        ("clip-score {class} --clip {clip}", "is told classes"),
        ("clip-score {real} --clip {dinov2}", "is of Dinov2Model; it must be of CLIPModel"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, trained, judges, sets, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "prompts.jsonl").write_text(LINES[0])
    places = {
        **{name: trained / name for name in ("text", "class")},
        **judges,
        **{name: tmp_path / name for name in ("none", "out", "bad")},
        "real": sets / "real",
        "sets": sets,
        "prompts": tmp_path / "prompts.jsonl",
    }
    words = [word.format(**places) for word in argv.split()]
    if words[0] in ("check-geneval", "summary"):
        assert tool.main(words) == 2
        errors = capsys.readouterr().err.splitlines()
    else:
        answers = run_ranks(on_rank, 2, words)
        assert [status for status, _ in answers] == [2, 2]
        errors = [line for _, text in answers for line in text.splitlines() if line.startswith("evaluate: ")]
    assert len(errors) == 1 and re.match("evaluate: ", errors[0])
    assert re.search(message, errors[0]), errors[0]
    assert not (tmp_path / "out").exists()
