"""A page of docs/ whose commands work, one after the other, as a reader would type them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.commands import run_python

ROOT = Path(__file__).parents[2]
SHELL = re.compile(r"[$;|&<>*`]|python - ")  # what a shell has to read


def commands(name: str) -> list[str]:
    """The lines of the page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def working_folder(folder: Path) -> Path:
    """A folder that sees the tools and the examples."""
    for name in ("tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str, folder: Path, **variables: str) -> str:
    """Its output; the command must work."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path} | variables
    words = shlex.split(command, comments=True)
    if words[:1] == ["python"] and not SHELL.search(command):
        done = run_python(*words[1:], cwd=folder, env=environment)
    else:
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
