"""Every configuration is accepted, every script parses, and every command that is printed somewhere exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megadit.training.config import check, load_config

SCRIPTS = sorted(
    path
    for folder in ("examples", "tests", "tools", ".ci")
    for path in Path(folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path == Path(".ci/run")
)
CONFIGS = sorted(Path("examples").rglob("*.yaml"))
STARTS = r"(?:-m megadit\.train --config|bash examples/launch/\w+\.sh)"
PAGES = [Path("README.md"), *SCRIPTS]
# Processes besides the fewest that the degrees need.
WORLDS = {"digits": (1, 2), "digits_dense": (1, 2), "digits_class": (1, 2)}


def test_the_lists_are_not_empty():
    assert {"examples/quickstart.sh", "tests/run.sh"} <= {str(path) for path in SCRIPTS}
    assert {"examples/configs/digits.yaml"} <= {str(path) for path in CONFIGS}
    assert len(training_commands()) >= 4


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_parses(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_configuration_passes_the_rules(path):
    config = load_config(path)
    degrees = config.parallel
    for world_size in {degrees.tensor * degrees.pipeline * degrees.expert, *WORLDS.get(path.stem, ())}:
        check(config, world_size)


def training_commands():
    """(page, processes, configuration, overrides) of each training of an example that README or a script starts."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        ranks = re.search(r"^ranks=(\d+)$", text, re.MULTILINE)
        for line in text.splitlines():
            if (at := re.search(STARTS + r" (examples/\S+\.yaml)([^#`>]*)", line)) is None:
                continue
            processes = re.search(r"(?:--nproc-per-node |NPROC=)(\d+|\"\$ranks\")", line)
            count = 1 if processes is None else int(processes[1] if processes[1].isdigit() else ranks[1])
            words = shlex.split(at[2], posix=True)
            overrides = [word for word in words if re.fullmatch(r"\w+\.\w+=\S+", word)]
            assert all(word in overrides or word == "$@" for word in words), f"{page}: what is {at[2]}?"
            found.append((page, count, at[1], overrides))
    return found


@pytest.mark.parametrize(
    ("page", "world_size", "path", "overrides"),
    training_commands(),
    ids=lambda value: str(value) if isinstance(value, Path) else "",
)
def test_a_printed_training_command_is_accepted(page, world_size, path, overrides):
    check(load_config(path, overrides), world_size)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_that_is_named_exists(page):
    # What a run writes is not here, and X.yaml stands for a name.
    named = re.findall(r"(?<![\w/.])(?:examples|tests|tools)/[\w./-]+\.(?:sh|py|yaml|sbatch)\b", page.read_text())
    assert [name for name in named if not Path(name).exists()] == []
