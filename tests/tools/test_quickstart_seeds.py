"""The quickstart's figures are those of its records, and its records are of today's configurations."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import train_on


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load_tool("quickstart_seeds")


def test_every_recorded_run_reaches_the_mark(tool):
    for group in tool.GROUPS:
        for seed in group.seeds:
            record = tool.read_record(tool.record_path(tool.RECORDS, group, seed), group.run_config(seed))
            name = f"{group.name}, seed {seed}"
            assert (record["seed"], record["processes"]) == (seed, group.processes), name
            assert record["judge"]["samples"] == 500 and record["judge"]["step"] == record["steps"], name
            assert record["judge"]["read_as_prompted"] >= 0.97, name
            assert record["judge"]["distance_ratio"] >= 0.9, name


def test_the_readme_shows_what_the_records_say(tool):
    page = Path("README.md").read_text()
    assert tool.table(tool.RECORDS) in page
    example = json.loads((tool.RECORDS / "experts_4_seed0.json").read_text())
    assert "\n".join(["```", *load_tool("judge_digits").summary(example["judge"]), "```"]) in page


@pytest.mark.parametrize(
    ("values", "printed"), [([10.2, None, 9.0], "9 to 10"), ([1.2, 0.9], "1"), ([None], "unknown"), ([0.0], "0")]
)
def test_a_range_is_of_what_is_known(values, printed, tool):
    assert tool.value_range(values, ".0f") == printed


@pytest.fixture
def tiny(tool):
    """A row of two runs, of one step each."""
    return replace(
        tool.GROUPS[1],
        config="tests/configs/tiny.yaml",
        overrides=("run.steps=1", "log.evaluate_every=1"),
        seeds=(0, 1),
    )


@pytest.fixture
def conducted(tool, tiny, monkeypatch, tmp_path):
    """The tool's folders after both runs; a run is trained by this process's pool, and judged without a look."""

    def train_and_judge(group, seed, run):
        started.append(seed)
        command = ["--config", group.config, *group.overrides, f"run.seed={seed}", f"run.dir={run}"]
        assert [status for status, _ in train_on(1, *command)] == [0]
        result = {"read_as_prompted": 0.98 + 0.01 * seed, "distance_ratio": 1.0, "step": 1, "samples": 500}
        (run / "result.json").write_text(json.dumps(result))
        return 10.0 + seed

    started = []
    monkeypatch.setattr(tool, "train_and_judge", train_and_judge)
    tool.conduct([tiny], [0, 1, 2], tmp_path / "runs", tmp_path / "records")
    return tmp_path, started


def test_finished_runs_are_not_repeated_and_missing_ones_are_made_up_for(tool, tiny, conducted):
    folder, started = conducted
    assert started == [0, 1]
    (folder / "records/experts_1_seed1.json").unlink()
    tool.conduct([tiny], [0], folder / "runs", folder / "records")
    assert started == [0, 1]
    tool.conduct([tiny], [0, 1], folder / "runs", folder / "records")
    assert started == [0, 1, 1]
    made = [json.loads((folder / f"records/experts_1_seed{seed}.json").read_text()) for seed in (0, 1)]
    assert [record["cpu_seconds"] for record in made] == [10, None], "the repeated run was there already"


def test_the_table_has_ranges_over_the_seeds(tool, tiny, conducted):
    folder, _ = conducted
    heading, rule, row = tool.table(folder / "records", [tiny]).splitlines()
    assert heading.startswith("|  | seeds | read as prompted |")
    assert row.startswith("| experts, one process | 0, 1 | 0.980 to 0.990 | 1.00 | ")
    assert row.endswith(" | 10 to 11 |")
    assert heading.count("|") == rule.count("|") == row.count("|")


def test_a_record_tells_no_path_and_no_machine_name(tool, tiny, conducted):
    folder, _ = conducted
    text = (folder / "records/experts_1_seed0.json").read_text()
    assert str(folder) not in text and "runs" not in text
    record = json.loads(text)
    assert record["machine"].keys() == {"cpu", "cores", "threads_per_process"}
    assert record["versions"].keys() == {"megadit", "torch", "deepspeed", "python"}
    assert record["steps"] == 1 and record["training_seconds"] > 0


def test_a_record_of_another_configuration_is_refused_before_a_run_starts(tool, tiny, conducted):
    folder, started = conducted
    other = replace(tiny, overrides=(*tiny.overrides, "optim.lr=1e-5"), seeds=(2, 1))
    with pytest.raises(ValueError, match=r"experts_1_seed1\.json is of another configuration"):
        tool.conduct([other], [1, 2], folder / "runs", folder / "records")
    assert started == [0, 1]


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_broken_record_is_named(content, tool, tiny, tmp_path):
    tool.record_path(tmp_path, tiny, 0).write_text(content)
    with pytest.raises(ValueError, match=r"experts_1_seed0\.json is not a record"):
        tool.table(tmp_path, [tiny])
