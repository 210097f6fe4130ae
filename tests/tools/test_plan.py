"""The command that users type: the numbers that it prints, and what it says when a plan cannot be."""

from __future__ import annotations

import importlib.util
import json

import pytest
import yaml

from megadit.planning.hardware import GPUS

TOOL = "tools/plan.py"
LARGE = "examples/configs/ec_dit_m_64e.yaml"
SMALL = ("--config", "tests/configs/parity.yaml", "--world", "4")


def load_tool():
    spec = importlib.util.spec_from_file_location("plan", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL_MODULE = load_tool()


@pytest.fixture
def plan(capsys):
    """Runs the tool in this process: (exit status, output, errors)."""

    def run(*argv):
        status = TOOL_MODULE.main([str(word) for word in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_97_billion_parameter_model_in_numbers(plan):
    status, out, _ = plan("--config", LARGE, "--world", 512, "--gpu", "h100", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["parameters_total"] == pytest.approx(97.21e9, rel=0.015)
    assert told["parameters_activated"] == pytest.approx(8.27e9, rel=0.03)
    assert told["parameters_frozen"] == {"text_encoder": 670e6, "autoencoder": 84e6, "total": 754e6}
    assert told["parameters_total"] == told["parameters_trained"]["total"] + told["parameters_frozen"]["total"]
    assert told["headroom"] > 0.1 and told["peak_bytes"] < told["memory_bytes"]
    assert told["seconds"]["step"] == pytest.approx(sum(told["seconds"].values()) - told["seconds"]["step"])
    assert told["gpu_hours"] == pytest.approx(told["days"] * 24 * 512)
    assert told["days"] == pytest.approx(800_000 * 4096 / told["images_per_second"] / 86400)


def test_operations_are_those_of_one_image(plan):
    alone, pairs = (
        json.loads(plan(*SMALL, "--json", f"model.routing_group={group}")[1])["flops_per_image"] for group in (1, 2)
    )
    assert alone == pairs  # a capacity of two images is twice that of one


def test_the_plan_for_people(plan):
    status, out, _ = plan(*SMALL)
    assert status == 0
    for word in ("billion parameters", "weights", "activations", "all-reduce", "MFU", "GPU-hours", "fits"):
        assert word in out


def test_the_sizes_of_the_paper(plan):
    status, out, _ = plan("--sizes")
    assert status == 0 and "ec-dit-m-64e" in out and "97.21" in out and "%" in out


@pytest.mark.slow
def test_a_search_ranks_and_gives_reasons(plan):
    status, out, _ = plan(*SMALL, "--search", "zero.stage=1", "run.dtype=float32")
    assert status == 0 and "layouts fit" in out and "cannot be" in out
    status, out, _ = plan(*SMALL, "--search", "--json", "zero.stage=1", "run.dtype=float32")
    rows = json.loads(out)
    assert rows[0]["fits"] and rows[0]["seconds"] <= rows[1]["seconds"]
    assert any(not row["fits"] and row["reason"] for row in rows)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_names_the_nearest_that_does(plan, tmp_path):
    tight = yaml.safe_load(GPUS["h100"].to_yaml())
    tight["memory_bytes"] = 6_000_000
    (tmp_path / "tight.yaml").write_text(yaml.safe_dump(tight))
    overrides = ("zero.stage=1", "run.dtype=float32", "data.micro_batch=4")
    status, out, err = plan(*SMALL, "--gpu", tmp_path / "tight.yaml", *overrides)
    assert status == 1
    assert "DOES NOT FIT" in out and "pipeline rank 0" in err and "more than" in err
    nearest = err.split("the nearest layout that fits: ")[1].split()
    status, out, _ = plan(*SMALL, "--gpu", tmp_path / "tight.yaml", *overrides, *nearest)
    assert status == 0 and "DOES NOT FIT" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*SMALL, "--gpu", "h101"), "unknown GPU h101; the nearest is h100"),
        ((*SMALL, "--gpu", "nowhere.yaml"), "nowhere.yaml: No such file"),
        (("--config", "nowhere.yaml", "--world", "4"), "nowhere.yaml"),
        ((*SMALL, "parallel.tensor=3"), "parallel.tensor=3"),
        ((*SMALL, "parallel.expert=3"), "parallel.expert=3"),
        ((*SMALL, "model.layrs=3"), "the nearest is model.layers"),
        (("--config", "tests/configs/parity.yaml", "--world", "3", "parallel.tensor=2"), "does not divide"),
        (("--config", "tests/configs/parity.yaml", "--world", "0"), "--world 0"),
        (("--config", "tests/configs/parity.yaml"), "--config and --world are needed"),
        ((*SMALL, "--spare", "1"), "--spare 1.0"),
        ((*SMALL, "model.routing=token_choice", "model.dropless=true"), "model.dropless=true"),
    ],
)
def test_bad_input_is_one_line(plan, argv, message):
    status, out, err = plan(*argv)
    assert status == 2 and not out
    assert message in err and len(err.splitlines()) == 1
