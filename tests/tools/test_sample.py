"""Prompts to a PNG, by the command that users type."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.ranks import train_on


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
    return subprocess.run([sys.executable, "tools/sample.py", *map(str, argv)], capture_output=True, text=True)


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
    assert all((a == b).all() for a, b in zip(drawn["named"][:8], drawn["more"], strict=False))


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
