"""The mean of the weights of several checkpoints."""

import pytest
import torch

from megadit.checkpoint import load_tensors
from megadit.checkpoint.folder import latest
from megadit.conversion.average import average_weights
from megadit.conversion.export import Export, export_weights
from megadit.training.config import load_config
from tests.conversion.made import assert_same, make_run, silent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three checkpoints of one network, and what they hold."""
    folder = tmp_path_factory.mktemp("average")
    made = {}
    for seed in range(3):
        path = folder / f"run_{seed}"
        made[path] = make_run(
            path, "run.dtype=bfloat16", "zero.stage=1", kinds=("weight", "ema"), step=10 * seed, seed=seed,
            dtypes={"weight": torch.bfloat16, "ema": torch.float32},
        )  # fmt: skip
    return made


def expected(runs, kind, shares, dtype):
    names = [name.removeprefix(f"{kind}.") for name in next(iter(runs.values())) if name.startswith(f"{kind}.")]
    return {
        f"weight.{name}": sum(
            share * tensors[f"{kind}.{name}"].double() for share, tensors in zip(shares, runs.values(), strict=True)
        ).to(dtype)
        for name in names
    }


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        # Sums of the same float64 products in another order, rounded.
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)


def test_the_mean_of_averages_by_default(runs, tmp_path):
    average_weights([*runs], tmp_path / "mean", None, None, silent)
    path = latest(tmp_path / "mean" / "checkpoints")
    assert path.name == "step_00000020"
    assert_close(load_tensors(path), expected(runs, "ema", [1 / 3] * 3, torch.float32))
    config = load_config(tmp_path / "mean" / "config.yaml")
    assert (config.run.dtype, config.run.dir) == ("float32", str(tmp_path / "mean"))
    assert (tmp_path / "mean" / "tokenizer.model").read_bytes() == b"tokenizer"


def test_shares_need_not_sum_to_one(runs, tmp_path):
    average_weights([*runs], tmp_path / "mean", "ema", [2, 0, 6], silent)
    wanted = expected(runs, "ema", [0.25, 0, 0.75], torch.float32)
    assert_close(load_tensors(latest(tmp_path / "mean" / "checkpoints")), wanted)


def test_bfloat16_weights_are_rounded_once(runs, tmp_path):
    average_weights([*runs], tmp_path / "mean", "model", [1, 1, 2], silent)
    wanted = expected(runs, "weight", [0.25, 0.25, 0.5], torch.bfloat16)  # exact in float64, in any order
    assert_same(load_tensors(latest(tmp_path / "mean" / "checkpoints")), wanted)


def test_the_mean_of_copies_is_the_copy_in_any_precision(runs, tmp_path):
    """Sources of two precisions: the wider one is kept. A large tensor comes in rows, as many of each."""
    first = next(iter(runs))
    export_weights(first, tmp_path / "wide", Export(weights="ema", dtype=torch.float64), silent)
    average_weights([first, tmp_path / "wide"], tmp_path / "mean", "ema", None, silent)
    wanted = {
        f"weight.{name.removeprefix('ema.')}": tensor.double()
        for name, tensor in runs[first].items()
        if name.startswith("ema.")
    }
    assert_same(load_tensors(latest(tmp_path / "mean" / "checkpoints")), wanted)


def test_every_difference_between_sources_is_in_one_error(runs, tmp_path):
    first = next(iter(runs))
    make_run(tmp_path / "other", "model.experts=8", "model.gate=sigmoid", "model.bias=true", kinds=("ema",))
    with pytest.raises(ValueError, match="these are not of one network") as error:
        average_weights([first, tmp_path / "other"], tmp_path / "mean", None, None, silent)
    lines = str(error.value).splitlines()
    other = tmp_path / "other" / "checkpoints" / "step_00000003"
    assert f"  blocks.0.attention.out.bias: only {other} has it" in lines
    assert any("blocks.1.feedforward.experts.up: shape (8, 32, 128) in " in line for line in lines)
    assert f"  model.gate=softmax is now sigmoid in {other}" in lines
    assert not list(tmp_path.glob("mean*"))


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([1, 2], "names 2 shares of 3 sources"),
        ([1, -1, 1], "shares must be 0 or more"),
        ([0, 0, 0], "not all 0"),
        ([1, float("nan"), 1], "shares must be 0 or more"),
    ],
)
def test_shares_that_make_no_mean_are_refused(ratios, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        average_weights([*runs], tmp_path / "mean", None, ratios, silent)
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_the_weights_asked_for_is_named(runs, tmp_path):
    make_run(tmp_path / "plain", kinds=("weight",))
    with pytest.raises(ValueError, match=f"{tmp_path / 'plain'}.* holds no weights 'ema'"):
        average_weights([*runs, tmp_path / "plain"], tmp_path / "mean", None, None, silent)
