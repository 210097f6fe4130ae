"""Every configuration is accepted, every script parses, and every command that is printed somewhere exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megadit.model.config import PAPER_SIZES, PRESETS
from megadit.model.count import PAPER_TEXT
from megadit.training.config import check, load_config

SCRIPTS = sorted(
    path
    for folder in ("examples", "tests", "tools", ".ci")
    for path in Path(folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path == Path(".ci/run")
)
# Studies, which compare several, are tested with megadit/study.
CONFIGS = sorted(path for path in Path("examples").rglob("*.yaml") if "\nvariants:" not in path.read_text())
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


def stated_worlds(path):
    """The numbers of GPUs that a configuration says it is for."""
    stated = re.search(r"^# Cluster: (.*) GPUs of 80 GB", path.read_text(), re.MULTILINE)
    return [int(number.replace(",", "")) for number in stated[1].split(", or ")] if stated else []


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_configuration_passes_the_rules(path):
    config = load_config(path)
    degrees = config.parallel
    fewest = degrees.tensor * degrees.pipeline * degrees.expert
    for world_size in {fewest, *WORLDS.get(path.stem, ()), *stated_worlds(path)}:
        check(config, world_size)


def test_every_size_of_the_paper_has_a_configuration():
    configs = {load_config(path).model.preset: path for path in CONFIGS}
    presets = [preset for preset in PRESETS if preset.startswith("ec-dit-")]
    assert {*PAPER_SIZES} <= {*presets} <= {*configs}
    for preset in presets:
        config = load_config(configs[preset])
        assert {key: getattr(config.model, key) for key in PRESETS[preset]} == PRESETS[preset]
        assert (config.text, config.model.modulation) == (PAPER_TEXT, "scale_shift")
        assert (config.run.steps, config.data.global_batch, config.optim.lr) == (800_000, 4096, 1e-4)
        assert stated_worlds(configs[preset]), "its header says for how many GPUs it is"
    assert stated_worlds(configs["ec-dit-m-64e"]) == [512, 1024]


def training_commands():
    """(page, processes, configuration, overrides) of each training of an example that README or a script starts."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        ranks = re.search(r"^ranks=(\d+)$", text, re.MULTILINE)
        for line in text.splitlines():
            if (at := re.search(STARTS + r" (examples/\S+\.yaml)([^#`>]*)", line)) is None:
                continue
            processes = re.search(r"(?:--nproc-per-node |NPROC=|--world )(\d+|\"\$ranks\")", line)
            count = 1 if processes is None else int(processes[1] if processes[1].isdigit() else ranks[1])
            words = shlex.split(re.sub(r"--dry-run|--all-stages|--(world|as-rank) \d+", "", at[2]), posix=True)
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
