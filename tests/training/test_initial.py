"""`run.init_from`: a new run from the weights alone of another, every tensor accounted for."""

import os
import shutil

import pytest
import torch

from megadit.checkpoint import latest, load_tensors
from megadit.training.initial import load_initial
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import run_ranks, train_on
from tests.training.assembled import assembled

CONFIG = ["--config", "tests/configs/tiny.yaml"]
KINDS = ("weight.", "master.", "ema.")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps in float32 with masters and averages."""
    folder = tmp_path_factory.mktemp("initial") / "trained"
    results = train_on(
        1, *CONFIG, f"run.dir={folder}", "run.steps=3", "run.dtype=float32", "zero.stage=1", "run.seed=7"
    )
    assert results == [(0, results[0][1])], results
    return folder


def start(world_size, folder, *overrides):
    results = train_on(world_size, *CONFIG, f"run.dir={folder}", "run.steps=1", *overrides)
    return [status for status, _ in results], "".join(errors for _, errors in results)


def state(folder, prefix):
    tensors = load_tensors(latest(folder / "checkpoints"), prefix=prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, ["run.dtype=float32", "zero.stage=1"]),
        (2, ["run.dtype=bfloat16", "zero.stage=1", "parallel.tensor=2"]),
        (2, ["run.dtype=float64", "parallel.expert=2"]),
        (2, ["run.dtype=float32", "zero.stage=2", "parallel.pipeline=2"]),
    ],
)
def test_every_kind_of_state_starts_as_the_weights(trained, tmp_path, world_size, layout):
    # A learning rate of zero: what is saved after the step is what it started from.
    still = ["optim.lr=0", f"run.init_from={trained}"]
    status, errors = start(world_size, tmp_path / "run", *layout, *still)
    assert status == [0] * world_size, errors
    assert f"starting from the weights of {latest(trained / 'checkpoints')}" in errors
    weights = state(trained, "weight.")
    started = {kind: state(tmp_path / "run", kind) for kind in KINDS}
    assert started["weight."].keys() == started["ema."].keys() == weights.keys()
    for name, weight in weights.items():
        for kind in KINDS:
            if name in started[kind]:
                found = started[kind][name]
                torch.testing.assert_close(found, weight.to(found.dtype), rtol=0, atol=0, msg=f"{kind}{name}")
    assert (layout[0] == "run.dtype=float64") == (not started["master."])


def test_the_averages_can_be_taken(trained, tmp_path):
    status, errors = start(1, tmp_path / "run", "optim.lr=0", f"run.init_from={trained}", "run.init_weights=ema")
    assert status == [0], errors
    averages, weights = state(trained, "ema."), state(tmp_path / "run", "weight.")
    assert any((averages[name] != weight).any() for name, weight in state(trained, "weight.").items())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, averages[name].to(weight.dtype), rtol=0, atol=0, msg=name)


def test_the_optimizer_and_the_data_start_afresh(trained, tmp_path):
    status, errors = start(1, tmp_path / "run", f"run.init_from={latest(trained / 'checkpoints')}", "optim.warmup=1")
    assert status == [0], errors
    (line,) = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert line["step"] == 1
    fresh = state(tmp_path / "run", "exp_avg_sq.")
    # After one step the moment is (1 - beta_2) g^2, with gradients clipped to a norm of at most 1.
    assert 0 < sum(float(moment.sum()) for moment in fresh.values()) <= 0.05 * (1 + 1e-9)
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (trained / "tokenizer.model").read_bytes()


def test_a_run_that_has_begun_goes_on_from_its_own_checkpoint(trained, tmp_path):
    command = [*CONFIG, f"run.dir={tmp_path / 'run'}", f"run.init_from={trained}"]
    train_on(1, *command, "run.steps=1")
    ((status, errors),) = train_on(1, *command, "run.steps=2", f"run.init_from={tmp_path / 'gone'}")
    assert status == 0, errors
    assert "going on from" in errors
    assert "starting from" not in errors


def test_another_model_of_the_same_shapes_is_announced(trained, tmp_path):
    changes = ["model.capacity_factor=1", "text.heads=4"]
    status, errors = start(1, tmp_path / "run", f"run.init_from={trained}", *changes)
    assert status == [0]
    assert "model.capacity_factor=2.0 is now 1.0" in errors
    assert "text.heads=2 is now 4" in errors
    assert errors.count("starting with another network") == 2


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["model.layers=5"], ["blocks.4.modulation.linear.weight: the model has it, run.init_from does not"]),
        (
            ["model.layers=3"],
            [f"blocks.3.{name}: run.init_from has it, the model does not" for name in ("attention.q.weight",)],
        ),
        (
            ["model.experts=8", "model.qk_norm=false"],
            [
                "blocks.1.feedforward.experts.up: shape (4, 32, 128) in run.init_from, (8, 32, 128) in the model",
                "blocks.0.attention.q_norm.weight: run.init_from has it, the model does not",
            ],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_all_named(trained, tmp_path, overrides, messages):
    status, errors = start(2, tmp_path / "run", f"run.init_from={trained}", *overrides)
    assert status == [2, 2]
    for message in messages:
        assert errors.count(message) == 1, errors
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("which", ["nowhere", "empty"])
def test_what_is_no_checkpoint_is_refused(tmp_path, which):
    (tmp_path / "empty").mkdir()
    status, errors = start(1, tmp_path / "run", f"run.init_from={tmp_path / which}")
    assert status == [2]
    assert str(tmp_path / which) in errors


def test_a_path_that_leads_nowhere_is_not_taken_for_a_missing_tokenizer(tmp_path):
    status, errors = start(1, tmp_path / "run", f"run.init_from={tmp_path / 'typo'}")
    assert status == [2]
    assert f"{tmp_path / 'typo'} does not exist" in errors


def test_a_link_to_a_checkpoint_still_finds_its_tokenizer(trained, tmp_path):
    (tmp_path / "link").symlink_to(latest(trained / "checkpoints"))
    status, errors = start(1, tmp_path / "run", f"run.init_from={tmp_path / 'link'}")
    assert status == [0], errors


def test_a_damaged_source_is_refused(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (file,) = latest(copy / "checkpoints").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, errors = start(2, tmp_path / "run", f"run.init_from={copy}")
    assert status == [2, 2]
    assert f"{file} is damaged" in errors


def test_all_ranks_take_what_the_first_one_finds(trained):
    """A run that goes on may have a newer checkpoint when the next rank looks; here the path means another folder."""
    assert run_ranks(load_with_another_home, 2, trained, limit=120) == [True, True]


def load_with_another_home(rank, world_size, trained):
    tokenizer = f"text.tokenizer={trained / 'tokenizer.model'}"
    run = assembled(rank, world_size, "run.dtype=float32", "zero.stage=1", "run.init_from=~/trained", tokenizer)
    home = os.environ.get("HOME", "")
    os.environ["HOME"] = str(trained.parent) if rank == 0 else "/nowhere"
    try:
        load_initial(run)
    finally:
        os.environ["HOME"] = home
    weights = state(trained, "weight.")
    return all(torch.equal(parameter.detach(), weights[name]) for name, parameter in run.named)


def test_a_checkpoint_without_its_tokenizer_asks_for_one(trained, tmp_path):
    moved = tmp_path / "moved"
    latest(trained / "checkpoints").rename(moved)
    try:
        status, errors = start(1, tmp_path / "run", f"run.init_from={moved}")
        assert status == [2]
        assert "set text.tokenizer" in errors
        status, errors = start(
            1, tmp_path / "run", f"run.init_from={moved}", f"text.tokenizer={trained / 'tokenizer.model'}"
        )
        assert status == [0], errors
    finally:
        moved.rename(trained / "checkpoints" / "step_00000003")
