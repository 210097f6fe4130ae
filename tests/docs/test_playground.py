"""docs/playground.md: its commands work, as a reader would type them, but for the port, which is one that is free."""

import json
import re
import shutil

import pytest

from tests.docs.page import ROOT, commands, run
from tests.playground.opened import ask, opened
from tests.ranks import train_on

START, DRAW = commands("playground.md")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the first command starts, on the run that it names."""
    program, run_folder = START.removeprefix("python ").split()
    assert program == "tools/playground.py"
    folder = tmp_path_factory.mktemp("page")
    overrides = ["run.steps=2", f"run.dir={folder / run_folder}"]
    assert train_on(1, "--config", "tests/configs/tiny.yaml", *overrides)[0][0] == 0
    with opened(folder / run_folder) as place:
        yield place


def test_the_first_command_starts_the_page(place):
    status, _, content = ask(place, "GET", "/")
    assert status == 200 and "<h1>Playground: digits</h1>" in content.decode()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_program_draws(place, tmp_path):
    told = json.loads(run(DRAW.replace(":7860/", f":{place[1]}/"), tmp_path))
    assert (told["prompt"], told["seed"]) == ("a handwritten seven", 3)
    assert told["pictures"][0].startswith("data:image/png;base64,")
    assert ask(place, "GET", f"/overlay?drawing={told['drawing']}&layer=1&step=mean")[0] == 200


def test_what_the_page_names_is_there():
    page = (ROOT / "docs/playground.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / target).resolve().exists(), target
    source = (ROOT / "tools/playground.py").read_text()
    flags = re.findall(r"^\| `(--\w+)", page, re.MULTILINE)
    assert len(flags) == 4 and all(f'"{flag}"' in source for flag in flags)
