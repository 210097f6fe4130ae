"""The start of every command: --help and what is refused need none of the packages that take seconds to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("torch", "deepspeed", "transformers", "diffusers", "tokenizers", "sentencepiece", "torchmetrics", "sklearn",
        "torch_fidelity", "scipy", "matplotlib", "pandas", "pyarrow", "tensorboard")  # fmt: skip
HELP, UNKNOWN = ["--help"], ["--no-such-option"]
CONFIG = "tests/configs/tiny.yaml"

# Of each tool, input that is refused, such as a path that is not there.
REFUSED = {
    "bench_checkpoint": ["--folder", "no/folder"],
    "bench_guard": ["--config", "no/config.yaml"],
    "bench_loader": ["--folder", "no/folder"],
    "bench_moe": ["--json", "no/folder/moe.json"],
    "calibrate": ["--judge", "no/gpu.yaml"],
    "check_cluster": ["--layout", "tensor=2"],
    "convert_checkpoint": ["inspect", "no/run"],
    "encode_dataset": ["no/images.tar", "--out", "no/set", "--autoencoder", "pixels"],
    "evaluate": ["heldout", "no/run"],
    "heatmap": ["no/run", "a seven"],
    "judge_digits": ["no/run"],
    "judge_shapes": ["no/run"],
    "parity_table": ["--config", "no/config.yaml"],
    "plan": ["--config", CONFIG, "--world", "2", "model.layer=4"],
    "playground": ["no/run"],
    "plot_loss": ["no/run", "--out", "no/loss.png"],
    "report": ["no/run"],
    "quickstart_seeds": ["--groups", "none"],
    "reproduce": ["run", "no/study.yaml"],
    "sample": ["no/run"],
    "tiny_encoders": ["setup.py/encoders"],
}
# Of tools with more than one way to name what is not there.
MORE = [
    ("encode_dataset", ["--verify", "--out", "no/set"]),
    ("evaluate", ["summary", "no/results.jsonl"]),
    ("evaluate", ["fid", "no/photographs", "no/drawn", "--features", "no/model"]),
    ("evaluate", ["clip-score", "no/drawn", "--clip", "no/model"]),
    ("reproduce", ["report", "no/page.md"]),
]
CONFIGURATIONS = {
    "no file": ["--config", "no/config.yaml"],
    "unknown key": ["--config", CONFIG, "model.layer=4"],
    "bad value": ["--config", CONFIG, "model.layers=four"],
    "broken rule": ["--config", CONFIG, "parallel.tensor=3"],
    "dry run": ["--config", CONFIG, "--dry-run", "model.layer=4"],
}

# Runs commands one after another in one interpreter, where a slow import fails and is noted.
DRIVER = """
import contextlib, io, json, runpy, sys

SLOW, COMMANDS = json.load(sys.stdin)


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in SLOW:
            imported.append(name)
            raise ImportError(f"{name} takes seconds")


sys.meta_path.insert(0, Refuse())
for program, argv in COMMANDS:
    imported, said = [], io.StringIO()
    sys.argv = [program, *argv]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            if program.endswith(".py"):
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as ended:
            status = ended.code
        except ImportError as error:
            status = str(error)
    sys.__stdout__.write(json.dumps([status, imported, said.getvalue()]) + "\\n")
"""


def start(commands):
    """What became of each command: (exit status, slow packages that it wanted, what it said)."""
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "SLURM_PROCID")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps([SLOW, commands]), env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def tools():
    """Every tool, and what it is refused for."""
    found = sorted(Path("tools").glob("*.py"))
    assert {path.stem for path in found} == set(REFUSED), "name an input that is refused, of every tool"
    return {str(path): REFUSED[path.stem] for path in found}


def test_help_of_a_tool_needs_no_slow_package(tools):
    for tool, (status, imported, said) in zip(tools, start([(tool, HELP) for tool in tools]), strict=True):
        assert (status, imported) == (0, []), tool
        assert said.startswith("usage: "), tool


def test_an_argument_that_a_tool_refuses_needs_no_slow_package(tools):
    refused = [(tool, UNKNOWN) for tool in tools] + list(tools.items())
    refused += [(f"tools/{tool}.py", argv) for tool, argv in MORE]
    for command, (status, imported, said) in zip(refused, start(refused), strict=True):
        assert (status, imported) == (2, []), (command, said)
        assert said.strip(), command


def test_help_and_a_configuration_that_is_refused_need_no_slow_package():
    commands = [("megadit.train", argv) for argv in (HELP, UNKNOWN, *CONFIGURATIONS.values())]
    (status, imported, said), *refused = start(commands)
    assert (status, imported) == (0, []) and "model.layers=28" in said
    for command, (status, imported, said) in zip(commands[1:], refused, strict=True):
        assert (status, imported) == (2, []), (command, said)
        assert said.startswith("usage: ") or said.count("\n") == 1, said
