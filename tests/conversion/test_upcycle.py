"""A dense checkpoint becomes a mixture of experts."""

import dataclasses
import re

import pytest
import torch

from megadit.checkpoint import load_tensors
from megadit.checkpoint.folder import latest
from megadit.conversion.export import Export, export_weights
from megadit.conversion.upcycle import departures, upcycle
from megadit.conversion.weights import parameters_of
from megadit.model.config import ECDiTConfig
from megadit.model.ecdit import ECDiT
from megadit.model.weights import init_of
from megadit.parallel.grid import Group
from megadit.parallel.tensor.mappings import ReplicatedTokens
from megadit.runtime.seed import stream
from megadit.training.config import load_config
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.conversion.made import CONFIG, files_in, make_run, read_config, silent
from tests.ranks import train_on
from tests.tiers import slow_but

DENSE = ["model.experts=0"]
SURE = ["model.experts=4", "model.capacity_factor=4"]  # softmax over experts that all take all


def tensors_of(run):
    return load_tensors(latest(run / "checkpoints"))


def output(run, images=2):
    """What the weights of a run's folder make of some input, in float64."""
    config = load_config(run / "config.yaml")
    model = dataclasses.replace(config.model, routing_group="sample")
    alone = Group(None, 1, 0)
    network = ECDiT(model, config.text, range(model.layers), ReplicatedTokens(alone), alone).double()
    weights = {name.removeprefix("weight."): t for name, t in tensors_of(run).items() if name.startswith("weight.")}
    network.load_state_dict(weights, strict=True)
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(images, model.channels, model.image_size, model.image_size, generator=generator).double()
    ids = torch.randint(config.text.vocabulary, (images, config.text.length), generator=generator)
    with torch.no_grad():
        out = network(
            image,
            timesteps_B=torch.linspace(0.1, 0.9, images).double(),
            size=(model.image_size, model.image_size),
            text_ids_BL=ids,
            text_mask_BL=torch.ones_like(ids, dtype=torch.bool),
        )
    return out if isinstance(out, torch.Tensor) else out[0]


def test_experts_are_the_dense_layer_turned_and_the_rest_is_as_it_was(tmp_path):
    dense = make_run(tmp_path / "dense", *DENSE, "model.feedforward=swiglu", "model.bias=true", step=11)
    upcycle(tmp_path / "dense", tmp_path / "moe", SURE, 0.0, None, silent)
    assert latest(tmp_path / "moe" / "checkpoints").name == "step_00000011"
    found = tensors_of(tmp_path / "moe")
    config = load_config(tmp_path / "moe" / "config.yaml")
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    expected = {f"{kind}.{name}": p.shape for kind in kinds for name, p in parameters_of(config).items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    for kind in kinds:
        for layer in (1, 3):
            ours, theirs = f"{kind}.blocks.{layer}.feedforward.experts", f"{kind}.blocks.{layer}.feedforward"
            for part in ("up", "gate", "down"):
                for expert in range(4):
                    assert torch.equal(found[f"{ours}.{part}"][expert], dense[f"{theirs}.{part}.weight"].t())
                    assert torch.equal(found[f"{ours}.{part}_bias"][expert], dense[f"{theirs}.{part}.bias"])
    router = "blocks.1.feedforward.router.weight"
    drawn = init_of(router, config.model, config.text).draw((4, 32), stream(config.run.seed, router)).double()
    assert torch.equal(found[f"weight.{router}"], drawn)
    assert torch.equal(found[f"ema.{router}"], drawn)
    assert not found[f"exp_avg.{router}"].any()
    assert not found[f"exp_avg_sq.{router}"].any()
    shared = found.keys() & dense.keys()
    assert len(shared) == len(dense) - len(kinds) * 2 * 6  # all but the two layers' three matrices and biases
    for name in shared:
        assert torch.equal(found[name], dense[name]), name


def test_the_folder_is_of_the_same_run_with_experts(tmp_path):
    make_run(tmp_path / "dense", *DENSE, "optim.lr=0.125")
    upcycle(
        tmp_path / "dense",
        tmp_path / "moe",
        [*SURE, "model.gate=sigmoid", "model.normalise_gates=true"],
        0.0,
        None,
        silent,
    )
    before, after = read_config(tmp_path / "dense"), read_config(tmp_path / "moe")
    changed = {"experts": 4, "capacity_factor": 4, "gate": "sigmoid", "normalise_gates": True}
    assert after["model"] == before["model"] | changed
    assert after["run"] == before["run"] | {"dir": str(tmp_path / "moe"), "name": "moe"}
    assert {key: after[key] for key in after.keys() - {"model", "run"}} == {
        key: before[key] for key in before.keys() - {"model", "run"}
    }
    assert (tmp_path / "moe" / "tokenizer.model").read_bytes() == b"tokenizer"


# --- whether it computes what the dense network did -------------------------------------------------------------------

EXACT = {
    "softmax over all": SURE,
    "normalised sigmoid": [
        "model.experts=3", "model.capacity_factor=3", "model.gate=sigmoid", "model.normalise_gates=true",
    ],
    "top 2 without a capacity": [
        "model.experts=4", "model.routing=token_choice", "model.dropless=true", "model.normalise_gates=true",
    ],
    "top 2 with room for all": [
        "model.experts=4", "model.routing=token_choice", "model.capacity_factor=2", "model.normalise_gates=true",
    ],
    "all of 2": ["model.experts=2", "model.routing=token_choice", "model.dropless=true"],
    "every layer, time read": [*SURE, "model.moe_every=1", "model.router_input=timestep"],
}  # fmt: skip
INEXACT = {
    "not all are taken": (
        ["model.experts=4", "model.capacity_factor=0.5", "model.normalise_gates=true"],
        "not every token is certain of an expert",
    ),
    "dropped": (
        ["model.experts=4", "model.routing=token_choice", "model.capacity_factor=0.25", "model.normalise_gates=true"],
        r"not every token is certain of an expert \(with model.dropless=true it is\)",
    ),
    "top 2 of softmax": (
        ["model.experts=4", "model.routing=token_choice", "model.dropless=true"],
        "gates do not sum to 1",
    ),
    "sigmoid": ([*SURE, "model.gate=sigmoid"], "gates do not sum to 1"),
    "scaled": ([*SURE, "model.route_scale=2.5"], "model.route_scale=2.5"),
    "shared": ([*SURE, "model.shared_experts=1"], "shared experts are added"),
    "one layer's capacity": (
        [*SURE, "model.capacity_overrides={3: 1}", "model.normalise_gates=true"],
        "not every token is certain of an expert",
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_it_computes_the_same_where_it_says_so(case, tmp_path):
    make_run(tmp_path / "dense", *DENSE, kinds=("weight",))
    made = upcycle(tmp_path / "dense", tmp_path / "moe", EXACT[case], 0.0, None, silent)
    assert made.departures == []
    torch.testing.assert_close(output(tmp_path / "moe"), output(tmp_path / "dense"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", INEXACT)
def test_it_says_why_where_it_does_not(case, tmp_path):
    overrides, reason = INEXACT[case]
    make_run(tmp_path / "dense", *DENSE, kinds=("weight",))
    made = upcycle(tmp_path / "dense", tmp_path / "moe", overrides, 0.0, None, silent)
    (found,) = made.departures
    assert re.search(reason, found)
    difference = (output(tmp_path / "moe") - output(tmp_path / "dense")).abs().max()
    assert difference > 1e-6


def test_reasons_add_up():
    model = ECDiTConfig(layers=2, experts=4, route_scale=2.0, shared_experts=1, gate="identity")
    assert len(departures(model, 0.1)) == 5


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_relative_differs_between_experts_and_repeats(tmp_path):
    kinds = ("weight", "master", "ema", "exp_avg", "exp_avg_sq")
    dtypes = {kind: torch.bfloat16 if kind == "weight" else torch.float32 for kind in kinds}
    options = ["run.dtype=bfloat16", "zero.stage=1"]
    dense = make_run(tmp_path / "dense", *DENSE, *options, kinds=kinds, dtypes=dtypes)
    made = upcycle(tmp_path / "dense", tmp_path / "moe", SURE, 0.25, 7, silent)
    assert made.departures == ["experts differ by noise of 0.25"]
    found = tensors_of(tmp_path / "moe")
    up, whole = found["master.blocks.1.feedforward.experts.up"], dense["master.blocks.1.feedforward.up.weight"].t()
    added = up - whole
    ratio = added.square().mean(dim=(1, 2)).sqrt() / whole.square().mean().sqrt()
    torch.testing.assert_close(ratio, torch.full((4,), 0.25), rtol=0.05, atol=0)
    normalised = torch.nn.functional.normalize(added.flatten(1))
    assert (normalised @ normalised.t() - torch.eye(4)).abs().max() < 0.1
    for name, tensor in found.items():
        if name.startswith("weight."):
            assert torch.equal(tensor, found[name.replace("weight.", "master.", 1)].bfloat16()) or name in dense, name
    moved = found["ema.blocks.1.feedforward.experts.up"] - dense["ema.blocks.1.feedforward.up.weight"].t()
    torch.testing.assert_close(moved, added, rtol=0, atol=1e-5)
    for moment in ("exp_avg", "exp_avg_sq"):  # without noise, which could make a square negative
        whole = dense[f"{moment}.blocks.1.feedforward.up.weight"].t()
        assert torch.equal(found[f"{moment}.blocks.1.feedforward.experts.up"], whole.expand(4, -1, -1))
    upcycle(tmp_path / "dense", tmp_path / "again", SURE, 0.25, 7, silent)
    upcycle(tmp_path / "dense", tmp_path / "other", SURE, 0.25, 8, silent)
    same, other = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "other")
    for name in ("master.blocks.1.feedforward.experts.up", "weight.blocks.3.feedforward.router.weight"):
        assert torch.equal(same[name], found[name])
        assert not torch.equal(other[name], found[name])


# --- training goes on -------------------------------------------------------------------------------------------------

STATES = {
    "float64": ["run.dtype=float64", "zero.stage=0"],
    "bfloat16": ["run.dtype=bfloat16", "zero.stage=1"],
}


@pytest.mark.parametrize("state", slow_but({"float64"}, STATES))
def test_training_goes_on_from_the_step_on_other_ranks(state, tmp_path):
    command = ["--config", CONFIG, *STATES[state], *DENSE]
    assert [status for status, _ in train_on(1, *command, f"run.dir={tmp_path / 'dense'}", "run.steps=4")] == [0]
    upcycle(tmp_path / "dense", tmp_path / "moe", SURE, 0.0, None, silent)
    go_on = ["--config", str(tmp_path / "moe" / "config.yaml"), "run.steps=6", "parallel.expert=2"]
    results = train_on(2, *go_on)
    assert [status for status, _ in results] == [0, 0], results
    assert "going on with another" not in results[0][1], "the checkpoint's configuration is the run's"
    assert train_on(1, *command, f"run.dir={tmp_path / 'dense'}", "run.steps=6")[0][0] == 0
    dense, moe = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("dense", "moe"))
    assert [line["step"] for line in moe] == [5, 6]
    # The same network on the same data: the first loss is the same. Later the experts part.
    assert moe[0]["loss"] == pytest.approx(dense[4]["loss"], rel=1e-9 if state == "float64" else 2e-2)


@pytest.mark.slow
def test_twenty_steps_start_where_the_dense_model_stood_and_lower_the_held_out_loss(tmp_path):
    """The digits example, under ZeRO-1 in float32."""
    digits = ["--config", "examples/configs/digits_dense.yaml", "log.evaluate_every=20", "log.sample_every=0"]
    begun = [*digits, f"run.dir={tmp_path / 'dense'}", "run.steps=40"]
    assert [status for status, _ in train_on(1, *begun)] == [0]
    made = upcycle(tmp_path / "dense", tmp_path / "moe", SURE, 0.0, None, silent)
    assert made.departures == []
    assert [status for status, _ in train_on(1, *begun, "run.steps=41")] == [0]
    assert [status for status, _ in train_on(1, "--config", str(tmp_path / "moe" / "config.yaml"), "run.steps=60")] == [
        0
    ]
    dense, moe = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("dense", "moe"))
    assert [line["step"] for line in moe] == list(range(41, 61))
    assert moe[0]["loss"] == pytest.approx(dense[40]["loss"], abs=1e-4)
    assert moe[-1]["heldout_loss"] < 0.95 * dense[39]["heldout_loss"]


def test_an_export_is_upcycled_as_weights_alone(tmp_path):
    make_run(tmp_path / "dense", *DENSE)
    export_weights(tmp_path / "dense", tmp_path / "out", Export(weights="model", dtype=torch.float16), silent)
    upcycle(tmp_path / "out", tmp_path / "moe", SURE, 0.0, None, silent)
    found = tensors_of(tmp_path / "moe")
    assert {name.split(".")[0] for name in found} == {"weight"}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert read_config(tmp_path / "moe")["run"]["dtype"] == "float32"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.experts=4", "model.width=64", "model.bias=true"], "width=32 is now 64; model.bias=False is now True"),
        (["model.experts=4", "model.preset=ec-dit-xl"], "changes nothing else of a model"),
        (["model.routing_preset=nucleus"], "model.feedforward=gelu is now swiglu"),
        (["model.experts=4", "model.expert_ratio=2"], "experts of hidden width 64, the dense layers have 128"),
        (["model.experts=4", "optim.lr=1"], "'optim.lr=1' is not of the form model.key=value"),
        (["experts=4"], "'experts=4' is not of the form"),
        (["model.expert=4"], "unknown key model.expert; the nearest is model.experts"),
        (["model.routing_preset=gshart"], "unknown model.routing_preset gshart; the nearest is gshard"),
        (["model.top_k=1"], "would stay dense"),
        (["model.experts=4", "model.dropless=true"], "model.dropless=True is for token choice"),
        (["model.experts=many"], "model.experts='many'"),
    ],
)  # fmt: skip
def test_overrides_that_change_more_or_less_than_experts_are_refused(overrides, message, tmp_path):
    make_run(tmp_path / "dense", *DENSE, kinds=("weight",))
    with pytest.raises(ValueError, match=message):
        upcycle(tmp_path / "dense", tmp_path / "moe", overrides, 0.0, None, silent)
    assert not list(tmp_path.glob("moe*"))


def test_a_preset_of_routing_is_expanded(tmp_path):
    make_run(tmp_path / "dense", *DENSE, "model.feedforward=swiglu", kinds=("weight",))
    upcycle(tmp_path / "dense", tmp_path / "moe", ["model.routing_preset=dit-moe", "model.top_k=1"], 0.0, None, silent)
    model = read_config(tmp_path / "moe")["model"]
    assert (model["routing"], model["experts"], model["dropless"], model["top_k"]) == ("token_choice", 8, True, 1)


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_noise_that_is_no_number_is_refused(noise, tmp_path):
    make_run(tmp_path / "dense", *DENSE, kinds=("weight",))
    with pytest.raises(ValueError, match="--noise"):
        upcycle(tmp_path / "dense", tmp_path / "moe", SURE, noise, None, silent)


def test_a_source_with_experts_or_without_a_tensor_is_refused(tmp_path):
    make_run(tmp_path / "moe", kinds=("weight",))
    with pytest.raises(ValueError, match="has experts already"):
        upcycle(tmp_path / "moe", tmp_path / "out", SURE, 0.0, None, silent)
    make_run(tmp_path / "dense", *DENSE)
    manifest = latest(tmp_path / "dense" / "checkpoints") / "manifest.json"
    content = manifest.read_text()
    for name in ("ema.head.linear.bias", "exp_avg.blocks.0.attention.q.weight"):
        content = content.replace(f'"{name}"', f'"{name}_"')
    manifest.write_text(content)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="is not complete") as error:
        upcycle(tmp_path / "dense", tmp_path / "out", SURE, 0.0, None, silent)
    assert str(error.value).splitlines()[1:] == [
        "  ema.head.linear.bias: ema lacks it",
        "  ema.head.linear.bias_: only ema has it",
        "  exp_avg.blocks.0.attention.q.weight: exp_avg lacks it",
        "  exp_avg.blocks.0.attention.q.weight_: only exp_avg has it",
    ]
    assert files_in(tmp_path) == before
