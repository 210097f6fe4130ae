"""docs/sampling.md: the worked example, in the shell and in Python."""

import json
import re
import shlex
import sys

import pytest
from PIL import Image

from tests.docs.page import ROOT, commands, run, working_folder

pytestmark = pytest.mark.slow

COMMANDS = commands("sampling.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return working_folder(tmp_path_factory.mktemp("page"))


def test_the_commands_of_the_page_work_in_their_order(folder):
    """Later ones build on what earlier ones wrote."""
    for command in COMMANDS:
        run(command, folder)


def test_the_python_of_the_page_works(folder):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/sampling.md").read_text(), re.MULTILINE | re.DOTALL)
    run(f"{sys.executable} -c {shlex.quote(code)}", folder)
    assert Image.open(folder / "drawn/ring.png").size == (32, 32)


def test_what_the_example_leaves_is_whole(folder):
    assert len(list((folder / "drawn/pictures").glob("*.png"))) == 6
    assert {path.suffix for path in (folder / "drawn/heatmap").iterdir()} >= {".png", ".gif", ".csv", ".json"}
    assert len(json.loads((folder / "drawn/heldout.json").read_text())["bins"]) == 4
    assert json.loads((folder / "runs/try/shapes.json").read_text())["tasks"].keys() >= {"position"}
