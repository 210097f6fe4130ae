"""What a source holds, counted."""

import pytest
import torch

from megadit.conversion.contents import as_table, contents
from megadit.conversion.export import Export, export_weights
from tests.conversion.made import make_run, silent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contents") / "run"
    make_run(folder, kinds=("weight", "ema"), dtypes={"weight": torch.bfloat16})
    return folder


def test_a_checkpoint_is_counted_in_tensors_bytes_and_parameters(run):
    found = contents(run)
    assert (found["kind"], found["step"]) == ("checkpoint", 3)
    assert found["path"].endswith("step_00000003")
    assert found["config"]["model"]["experts"] == 4
    assert found["tensors"]["weight.blocks.1.feedforward.experts.up"] == {
        "shape": [4, 32, 128],
        "dtype": "bfloat16",
        "bytes": 4 * 32 * 128 * 2,
    }
    total = sum(tensor["bytes"] for name, tensor in found["tensors"].items() if name.startswith("weight.")) // 2
    assert found["bytes"] == total * (2 + 8)
    experts = 2 * 2 * 4 * 32 * 128  # two layers, two matrices
    # Of 4 experts 2 take a token on average.
    assert found["parameters"] == {"total": total, "experts": experts, "activated": total - experts // 2}


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        (["model.capacity_factor=4"], 1.0),
        (["model.capacity_overrides={1: 1}"], 0.375),  # a quarter in one layer, half in the other
        (["model.routing=token_choice", "model.top_k=1", "model.dropless=true"], 0.25),
        (["model.routing=token_choice", "model.top_k=2", "model.capacity_factor=1"], 0.5),
    ],
)
def test_activated_parameters_follow_the_routing(overrides, share, tmp_path):
    make_run(tmp_path / "run", *overrides, kinds=("weight",))
    counts = contents(tmp_path / "run")["parameters"]
    assert counts["activated"] == counts["total"] - (1 - share) * counts["experts"]


def test_names_are_chosen_by_pattern_and_layers_come_in_order(tmp_path):
    make_run(tmp_path / "run", "model.layers=12", "model.experts=0", kinds=("weight",))
    names = list(contents(tmp_path / "run", "weight.blocks.*.attention.q.weight")["tensors"])
    assert names == [f"weight.blocks.{layer}.attention.q.weight" for layer in range(12)]
    with pytest.raises(ValueError, match=r"no tensor whose name matches 'none\*'; such as weight\."):
        contents(tmp_path / "run", "none*")


def test_an_export_and_a_table(run, tmp_path):
    export_weights(run, tmp_path / "out", Export(dtype=torch.bfloat16), silent)
    found = contents(tmp_path / "out", "*.bias")
    assert (found["kind"], found["step"]) == ("export", 3)
    lines = as_table(found).splitlines()
    assert any(line.split() == ["head.linear.bias", "bfloat16", "4", "8"] for line in lines)
    assert f"{tmp_path / 'out'}: export, step 3, {found['bytes']:,} bytes" in lines
    assert f"parameters: {found['parameters']['total']:,} total, 65,536 experts" in "\n".join(lines)


def test_a_configuration_of_another_version_is_no_obstacle(run, tmp_path):
    export_weights(run, tmp_path / "out", Export(), silent)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"layers"', '"lairs"'))
    assert "activated" not in contents(tmp_path / "out")["parameters"]
