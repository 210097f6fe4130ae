"""Prompts to a PNG, by the command that users type."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.commands import Command, run_python
from tests.launch.environment import environ
from tests.ranks import tool_on, train_on

TOOL = "tools/sample.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "run"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=1")
    return folder


@pytest.fixture(scope="module")
def trained_on_classes(tmp_path_factory):
    """A run whose four images of a microbatch compete."""
    folder = tmp_path_factory.mktemp("sample") / "classes"
    overrides = ["model.conditioning=class", "model.classes=10", "model.routing_group=batch"]
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=1", *overrides)
    return folder


def sample(*argv):
    return run_python(TOOL, *argv)


def cells(path, rows, columns, zoom):
    """The pictures of a grid, row by row."""
    with Image.open(path) as picture:
        assert picture.size == (zoom * (9 * columns + 1), zoom * (9 * rows + 1))
        pixels = np.asarray(picture)[::zoom, ::zoom]
    return [pixels[9 * r + 1 : 9 * r + 9, 9 * c + 1 : 9 * c + 9] for r in range(rows) for c in range(columns)]


def test_without_prompts_it_draws_the_heldout_captions_into_the_runs_folder(trained):
    done = sample(trained, "--count", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{trained / 'samples.png'}\n"
    drawn = cells(trained / "samples.png", rows=2, columns=10, zoom=6)
    assert all(cell.std() > 0 for cell in drawn[:12])
    assert all((cell == 64).all() for cell in drawn[12:]), "places that stay empty are grey"


def test_prompts_are_repeated_and_laid_out_in_columns(trained, tmp_path):
    command = [trained, "a handwritten one", "the digit 2", "--repeat", 3, "--columns", 2, "--zoom", 2, "--steps", 1]
    pictures = {}
    for name, seed in (("a", 0), ("again", 0), ("other", 1)):
        path = tmp_path / "new folder" / f"{name}.png"
        done = sample(*command, "--sampler", "euler", "--guidance", 1, "--seed", seed, "--out", path)
        assert done.returncode == 0, done.stderr
        pictures[name] = cells(path, rows=3, columns=2, zoom=2)
    assert len({cell.tobytes() for cell in pictures["a"]}) == 6, "each picture starts from noise of its own"
    assert all((a == b).all() for a, b in zip(pictures["a"], pictures["again"], strict=True))
    assert all((a != b).any() for a, b in zip(pictures["a"], pictures["other"], strict=True))


def test_a_run_on_classes_draws_their_numbers_and_by_default_all_in_turn(trained_on_classes, tmp_path):
    drawn = {}
    for name, argv in {"named": range(10), "default": ["--count", 10], "more": [*range(10), 3]}.items():
        path = tmp_path / f"{name}.png"
        done = sample(trained_on_classes, *argv, "--columns", 5, "--zoom", 1, "--out", path)
        assert done.returncode == 0, done.stderr
        drawn[name] = cells(path, rows=3 if name == "more" else 2, columns=5, zoom=1)
    assert all((a == b).all() for a, b in zip(drawn["named"], drawn["default"], strict=True))
    # The groups of the first eight pictures are whole in all three.
    for cell, other in zip(drawn["named"][:8], drawn["more"], strict=False):
        assert np.abs(cell.astype(int) - other).max() <= 1


@pytest.mark.parametrize("prompt", ["seven", "10", "-1"])
def test_what_is_no_class_of_the_run_is_refused(prompt, trained_on_classes, tmp_path):
    done = sample(trained_on_classes, "3", prompt, "--out", tmp_path / "picture.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"sample: prompt {prompt!r} is not a class; write its number, 0 to 9\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_run_folder_is_refused_by_name(tmp_path):
    done = sample(tmp_path / "none", "a handwritten one")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sample: ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "none" / "config.yaml") in done.stderr


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def levels(folder):
    """The pictures of a folder, [N, H, W], as numbers that can be subtracted."""
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


FILE = "".join(f"a handwritten {word}\n" for word in ("one", "two", "three", "four", "five"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of enough steps that its experts tell tokens apart."""
    folder = tmp_path_factory.mktemp("sample") / "learned"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=40", "sample.steps=4")
    return folder


@pytest.fixture(scope="module")
def alone(learned, tmp_path_factory):
    """What one process makes of a file of prompts: its folder."""
    folder = tmp_path_factory.mktemp("sample") / "alone"
    path = folder.with_name("prompts.txt")
    path.write_text(FILE.replace("two\n", "two\n\n"))
    ((status, output, errors),) = tool_on(
        1, TOOL, learned, "--prompts", path, "--repeat", 2, "--folder", folder, "--out", folder.with_suffix(".png"),
        "--zoom", 1, "--columns", 5, "--batch", 3,
    )  # fmt: skip
    assert (status, output) == (0, f"{folder}\n{folder.with_suffix('.png')}\n"), errors
    assert "1 of 6 lines are empty, and skipped" in errors
    assert "pictures: 100%" in errors and "10/10" in errors and "steps:" in errors
    return folder


def test_a_folder_has_a_png_for_each_picture_and_says_what_it_is(alone):
    lines = [json.loads(line) for line in (alone / "prompts.jsonl").read_text().splitlines()]
    prompts = [prompt for prompt in FILE.splitlines() for _ in range(2)]
    assert lines == [
        {"index": i, "prompt": prompt, "seed": 0, "file": f"{i:05d}.png"} for i, prompt in enumerate(prompts)
    ]
    settings = json.loads((alone / "settings.json").read_text())
    assert settings["step"] == 40 and settings["steps"] == 4 and settings["sampler"] == "heun"
    assert (settings["height"], settings["width"], settings["dtype"]) == (8, 8, "float64")
    drawn = levels(alone)
    assert drawn.shape == (10, 8, 8) and len({picture.tobytes() for picture in drawn}) == 10
    grid = cells(alone.with_suffix(".png"), rows=2, columns=5, zoom=1)
    assert all((cell == picture).all() for cell, picture in zip(grid, drawn, strict=True))


@pytest.mark.slow
def test_four_processes_of_torchrun_draw_the_pictures_of_one(learned, alone, tmp_path):
    folder = tmp_path / "four"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", TOOL, learned]
    command += ["--tensor", 2, "--expert", 2, "--prompts", "-", "--repeat", 2, "--folder", folder]
    done = subprocess.run([str(part) for part in command], input=FILE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    assert files(folder).keys() == files(alone).keys()
    assert (folder / "prompts.jsonl").read_bytes() == (alone / "prompts.jsonl").read_bytes()
    assert np.abs(levels(folder) - levels(alone)).max() <= 1
    assert done.stderr.count("pictures:   0%") == 1, "one process shows its progress"


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(4, []), (2, ["--pipeline", 2, "--schedule", "zbv", "--batch", 4]), (2, ["--tensor", 2, "--sequence"])],
    ids=["data4", "zbv", "sequence"],
)
def test_every_layout_fills_the_folder_and_draws_the_grid_of_one_process(world_size, layout, learned, alone, tmp_path):
    argv = [learned, *FILE.splitlines(), "--repeat", 2, *layout]
    folder, grid = tmp_path / "drawn", tmp_path / "grid.png"
    for where, printed in ((["--folder", folder], folder), (["--out", grid, "--zoom", 1, "--columns", 5], grid)):
        results = tool_on(world_size, TOOL, *argv, *where)
        assert [status for status, *_ in results] == [0] * world_size, results[0][2]
        assert [output for _, output, _ in results] == [f"{printed}\n"] + [""] * (world_size - 1)
        assert [errors for *_, errors in results[1:]] == [""] * (world_size - 1)
    assert np.abs(levels(folder) - levels(alone)).max() <= 1
    found = np.stack(cells(grid, rows=2, columns=5, zoom=1)).astype(int)
    assert np.abs(found - levels(alone)).max() <= 1


@pytest.mark.slow
def test_a_drawing_that_was_killed_goes_on(learned, tmp_path):
    prompts, folder, whole = tmp_path / "prompts.txt", tmp_path / "killed", tmp_path / "whole"
    prompts.write_text(FILE * 2)
    argv = [learned, "--prompts", prompts, "--steps", 40, "--batch", 2]
    # With as many threads as the ranks that go on: sums are cut otherwise among more.
    with Command([TOOL, *argv, "--folder", folder], env=environ()) as command:
        while len(list(folder.glob("*.png"))) < 2:
            assert command.poll() is None, command.stderr
            time.sleep(0.01)
        command.send_signal(signal.SIGKILL)
        command.wait()
    there = {path: (path.read_bytes(), path.stat().st_ino) for path in folder.glob("*.png")}
    assert 2 <= len(there) < 10
    for where in (folder, whole):
        ((status, _, errors),) = tool_on(1, TOOL, *argv, "--folder", where)
        assert status == 0, errors
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in there} == there, "not written again"
    left = {name: content for name, content in files(folder).items() if not name.endswith(".new")}
    assert left == files(whole), "bit for bit as if nothing had happened"
    # Other pictures do not mix with these, unless all are drawn again.
    ((status, output, errors),) = tool_on(1, TOOL, *argv, "--folder", folder, "--seed", 3)
    assert (status, output) == (2, "") and "line 1 has the seed 0, which is 3 now" in errors
    ((status, _, errors),) = tool_on(1, TOOL, *argv, "--folder", folder, "--seed", 3, "--steps", 2, "--overwrite")
    assert status == 0, errors
    assert levels(folder).tobytes() != levels(whole).tobytes() and len(levels(folder)) == 10


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tensor", 3], "--tensor 3 does not divide model.heads=4 and model.kv_heads=4"),
        (["--expert", 8], "--expert 8 times --tensor 1 does not divide model.experts=4; use --expert 1, 2 or 4"),
        (["--tensor", 4], "--tensor 4 x --pipeline 1 x --expert 1 = 4 does not divide the 2 processes"),
        (["--pipeline", 8], "--pipeline 8 cannot be filled by model.layers=4; use at most 4"),
        (["--pipeline", 2, "--schedule", "interleaved", "--stages-per-rank", 3],
         "--pipeline 2 x 3 stages per rank cannot be filled by model.layers=4"),
        (["--guidance", -1], "--guidance -1.0 must be 0 or more"),
        (["--guidance-rescale", 2], "--guidance-rescale 2.0 must be between 0 and 1"),
        (["--guidance-interval", 0.6, 0.3], "--guidance-interval 0.6 0.3 must be times between 0, the image, and 1"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_before_a_checkpoint_is_read(argv, message, learned, tmp_path):
    run = tmp_path / "run"  # has no checkpoint
    run.mkdir()
    (run / "config.yaml").write_bytes((learned / "config.yaml").read_bytes())
    first, second = tool_on(2, TOOL, run, "a seven", "--out", tmp_path / "out.png", *argv)
    assert (first[0], second[0]) == (2, 2)
    assert first[1:] == ("", first[2]) and first[2].startswith(f"sample: {message}"), first[2]
    assert first[2].count("\n") == 1 and second[1:] == ("", "")
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "none.txt"], "prompts none.txt: No such file or directory"),
        (["--prompts", "tests/configs"], "prompts tests/configs: Is a directory"),
        (["a", "--folder", "{file}/drawn"], "{file}/drawn cannot be written: {file} is not a folder"),
        (["a", "--out", "{file}/grid.png"], "{file}/grid.png cannot be written: {file} is not a folder"),
        (["a", "--size", "9x8"], "--size 9x8 must be multiples of 2 pixels"),
        (["a", " "], "prompt 1 is empty; say what to draw"),
        (["a", "--tensor", 2, "--sequence", "--size", "6x6"],
         "latent images of 6 x 6 have 9 tokens, which --tensor 2 does not divide; use no --sequence"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_on_all_ranks_before_drawing(argv, message, learned, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    where = [] if {"--out", "--folder"} & set(argv) else ["--folder", tmp_path / "drawn"]
    argv = [str(part).format(file=file) for part in argv]
    first, second = tool_on(2, TOOL, learned, *argv, *where)
    assert (first[0], second[0]) == (2, 2)
    assert first[2].startswith(f"sample: {message.format(file=file)}") and first[2].count("\n") == 1, first[2]
    assert first[1] == second[1] == second[2] == ""
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--prompts", "x.txt"], "prompts are given twice"),
        (["a", "--overwrite"], "--overwrite is for --folder"),
        (["a", "--sampler", "ddim"], "invalid choice: 'ddim'"),
        (["a", "--batch", "0"], "0 is not more than 0"),
        (["a", "--out", "grid.jpg"], "argument --out: grid.jpg does not end in .png"),
    ],
)
def test_options_that_contradict_one_another_are_refused(argv, message, learned):
    ((status, _, errors),) = tool_on(1, TOOL, learned, *argv)
    assert status == 2 and message in errors


def test_what_may_surprise_is_said(learned, tmp_path):
    run = shutil.copytree(learned, tmp_path / "run")
    (manifest,) = (run / "checkpoints").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    content["tensors"] = {name: entry for name, entry in content["tensors"].items() if not name.startswith("ema.")}
    manifest.write_text(json.dumps(content))
    argv = [run, "a seven", "--size", "8x12", "--steps", 1, "--out", tmp_path / "x.png"]
    ((status, _, errors),) = tool_on(1, TOOL, *argv)
    assert status == 0, errors
    assert "holds no averages (ema.*): pictures are drawn with its weights" in errors
    assert "the model was not trained on pictures of 8x12, but of 8x8; expect worse ones" in errors
    ((status, _, errors),) = tool_on(1, TOOL, learned, "a seven", "--out", tmp_path / "x.png")
    assert status == 0 and "averages" not in errors and "not trained" not in errors


def test_guidance_is_brought_back_and_kept_to_an_interval(learned, tmp_path):
    drawn = {}
    for name, how in {
        "plain": [],
        "rescaled": ["--guidance-rescale", 1],
        "late": ["--guidance-interval", 0, 0.5],
        "never": ["--guidance-interval", 0.9, 0.95],
        "none": ["--guidance", 1],
    }.items():
        argv = [learned, "a seven", "--steps", 2, "--sampler", "euler", "--folder", tmp_path / name]
        ((status, _, errors),) = tool_on(1, TOOL, *argv, *how)
        assert status == 0, errors
        drawn[name] = levels(tmp_path / name).tobytes()
    assert drawn["never"] == drawn["none"]
    assert len(set(drawn.values())) == 4
    settings = json.loads((tmp_path / "late" / "settings.json").read_text())
    assert (settings["guidance_from"], settings["guidance_until"], settings["guidance_rescale"]) == (0, 0.5, 0)


def test_help_teaches(learned):
    ((status, output, _),) = tool_on(1, TOOL, "--help")
    assert status == 0
    for word in ("torchrun", "srun", "deepspeed", "--tensor", "--folder", "prompts.jsonl", "heun", "zbv", "--batch"):
        assert word in output
