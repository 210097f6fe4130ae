"""Weights out of a checkpoint: whole, in other precisions, cut for ranks; and in again."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import megadit
from megadit.checkpoint import load_tensors
from megadit.checkpoint.folder import latest
from megadit.conversion.export import Export, export_weights
from megadit.conversion.run_folder import import_weights
from megadit.training.config import load_config
from megadit.training.loop import save
from megadit.training.progress import Progress
from tests.conversion.made import CONFIG, assert_same, files_in, make_run, read_config, silent
from tests.ranks import run_ranks
from tests.training.assembled import assembled


def export(run, out, **wanted):
    return export_weights(run, out, Export(**wanted), silent)


def kind_of(run, kind):
    path = latest(run / "checkpoints")
    return {name.removeprefix(f"{kind}."): t for name, t in load_tensors(path, prefix=f"{kind}.").items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    make_run(folder, kinds=("weight", "master", "ema"), dtypes={"weight": torch.bfloat16})
    return folder


@pytest.mark.parametrize(
    ("weights", "kind"), [(None, "ema"), ("ema", "ema"), ("model", "weight"), ("master", "master")]
)
def test_an_export_holds_the_weights_that_were_asked_for(weights, kind, run, tmp_path):
    done = export(run, tmp_path / "out", weights=weights)
    expected = "model" if kind == "weight" else kind
    assert repr(expected) in done
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), kind_of(run, kind))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = load_config(CONFIG).to_dict()
    assert config == {
        "format": "megadit",
        "megadit": megadit.__version__,
        "step": 3,
        "weights": expected,
        "model": plain["model"],
        "text": plain["text"],
    }
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"tokenizer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_export_rounds_to_the_precision_that_was_asked_for(dtype, run, tmp_path):
    export(run, tmp_path / "out", dtype=dtype)
    expected = {name: tensor.to(dtype) for name, tensor in kind_of(run, "ema").items()}
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_shards_are_as_large_as_asked_for_and_hold_the_same(run, tmp_path):
    export(run, tmp_path / "out", max_shard_bytes=200_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 3
    found = {}
    for name in names:
        shard = load_file(tmp_path / "out" / name)
        assert len(shard) == 1 or sum(t.numel() * t.element_size() for t in shard.values()) <= 200_000
        found |= shard
    assert_same(found, kind_of(run, "ema"))
    export(tmp_path / "out", tmp_path / "whole")  # an export is a source too
    assert_same(load_file(tmp_path / "whole" / "model.safetensors"), kind_of(run, "ema"))


# --- out and in again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "dtype"), [("model", "bfloat16"), ("ema", "float64")])
def test_export_and_import_give_the_same_bytes(weights, dtype, run, tmp_path):
    export(run, tmp_path / "out", weights=weights)
    done = import_weights(tmp_path / "out", tmp_path / "imported", silent)
    assert dtype in done
    imported = latest(tmp_path / "imported" / "checkpoints")
    assert imported.name == "step_00000000"
    kind = "weight" if weights == "model" else weights
    assert_same(load_tensors(imported), {f"weight.{name}": t for name, t in kind_of(run, kind).items()})
    assert (tmp_path / "imported" / "tokenizer.model").read_bytes() == b"tokenizer"
    config, before = read_config(tmp_path / "imported"), read_config(run)
    assert (config["model"], config["text"]) == (before["model"], before["text"])
    assert (config["run"]["dir"], config["run"]["dtype"]) == (str(tmp_path / "imported"), dtype)
    load_config(tmp_path / "imported" / "config.yaml")


def test_export_import_export_gives_equal_files(run, tmp_path):
    export(run, tmp_path / "first", weights="model", max_shard_bytes=300_000)
    import_weights(tmp_path / "first", tmp_path / "imported", silent)
    export(tmp_path / "imported", tmp_path / "second", max_shard_bytes=300_000)
    first, second = files_in(tmp_path / "first"), files_in(tmp_path / "second")
    assert json.loads(first.pop("config.json")) == json.loads(second.pop("config.json")) | {"step": 3}
    assert first == second


def test_float16_comes_in_as_float32(run, tmp_path):
    export(run, tmp_path / "out", dtype=torch.float16)
    import_weights(tmp_path / "out", tmp_path / "imported", silent)
    expected = {f"weight.{name}": t.half().float() for name, t in kind_of(run, "ema").items()}
    assert_same(load_tensors(latest(tmp_path / "imported" / "checkpoints")), expected)


# --- cut for ranks ----------------------------------------------------------------------------------------------------

WIDE = ["model.feedforward=swiglu", "model.bias=true", "model.shared_experts=1"]
LAYOUTS = {"tensor2_expert2": (2, 2), "tensor2": (2, 1), "expert4": (1, 4)}


def hold(rank, world_size, folder, tensor, expert):
    """What a rank of the layout holds; together they save it."""
    layout = [f"parallel.tensor={tensor}", f"parallel.expert={expert}"]
    run = assembled(rank, world_size, f"run.dir={folder}", *layout, *WIDE)
    folder.mkdir(parents=True, exist_ok=True)
    save(run, Progress())
    return run.grid["tp"].rank, run.grid["ep"].rank, {name: p.detach().numpy() for name, p in run.named}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_export_is_what_each_rank_of_that_layout_holds(layout, tmp_path):
    tensor, expert = LAYOUTS[layout]
    held = run_ranks(hold, tensor * expert, tmp_path / "run", tensor, expert)
    export(tmp_path / "run", tmp_path / "out", weights="model", tensor=tensor, expert=expert, cut=True)
    assert len(list((tmp_path / "out").iterdir())) == len(held) == tensor * expert
    for tensor_rank, expert_rank, parameters in held:
        folder = tmp_path / "out" / f"tensor_{tensor_rank:02d}_expert_{expert_rank:02d}"
        found = load_file(folder / "model.safetensors")
        assert found.keys() == parameters.keys()
        for name, parameter in parameters.items():
            np.testing.assert_array_equal(found[name].numpy(), parameter, err_msg=name)
        config = json.loads((folder / "config.json").read_text())
        assert (config["tensor"], config["expert"]) == ([tensor_rank, tensor], [expert_rank, expert])
    with pytest.raises(ValueError, match=r"is one rank's part of a network .*tensor \[0, "):
        import_weights(tmp_path / "out" / "tensor_00_expert_00", tmp_path / "imported", silent)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor": 3}, r"--tensor=3 does not divide .*model\.heads=4.* use 1, 2 or 4"),
        ({"expert": 8}, "--expert=8 times --tensor=1 does not divide model.experts=4; use --expert=1, 2 or 4"),
        ({"tensor": 2, "expert": 4}, "--expert=4 times --tensor=2 does not divide model.experts=4"),
    ],
)
def test_degrees_that_do_not_divide_are_refused(degrees, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "out", **degrees, cut=True)
    assert list(tmp_path.iterdir()) == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_there_are_refused(run, tmp_path):
    make_run(tmp_path / "plain", kinds=("weight",))
    with pytest.raises(ValueError, match="holds no weights 'master'; it holds model"):
        export(tmp_path / "plain", tmp_path / "out", weights="master")
    assert "'model'" in export(tmp_path / "plain", tmp_path / "out")
    with pytest.raises(ValueError, match="holds the weights 'model' alone"):
        export(tmp_path / "out", tmp_path / "other", weights="ema")


def test_numbers_beyond_float16_are_refused_by_name(tmp_path):
    make_run(tmp_path / "run", kinds=("weight",))
    export(tmp_path / "run", tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    tensors["head.linear.weight"][0, 0] = 1e5
    write(tmp_path / "first", tensors)
    with pytest.raises(ValueError, match=r"head\.linear\.weight has elements beyond the range of float16"):
        export(tmp_path / "first", tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.glob("out*"))
    export(tmp_path / "first", tmp_path / "out", dtype=torch.bfloat16)


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def test_every_tensor_that_does_not_fit_is_in_one_error(run, tmp_path):
    export(run, tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    del tensors["head.linear.bias"], tensors["blocks.0.attention.q.weight"]
    tensors["other"] = torch.zeros(1)
    tensors["blocks.1.feedforward.experts.up"] = tensors["blocks.1.feedforward.experts.up"][:3].clone()
    write(tmp_path / "first", tensors)
    for convert in (
        lambda: import_weights(tmp_path / "first", tmp_path / "out", silent),
        lambda: export(tmp_path / "first", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="does not fit the network") as error:
            convert()
        assert str(error.value).splitlines()[1:] == [
            "  blocks.0.attention.q.weight: the source lacks it",
            "  blocks.1.feedforward.experts.up: shape (3, 32, 128) in the source, (4, 32, 128) in the network",
            "  head.linear.bias: the source lacks it",
            "  other: only the source has it",
        ]
        assert not list(tmp_path.glob("out*"))


def test_weights_that_are_integers_are_refused(run, tmp_path):
    export(run, tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    tensors["head.linear.bias"] = tensors["head.linear.bias"].long()
    write(tmp_path / "first", tensors)
    with pytest.raises(ValueError, match="head.linear.bias is torch.int64"):
        import_weights(tmp_path / "first", tmp_path / "out", silent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "does not say which model"),
        (lambda c: c["model"].update(widht=3), "unknown key model.widht"),
        (lambda c: c["model"].update(heads=3), "model.kv_heads=4 does not divide model.heads=3"),
        (lambda c: c["model"].update(layers="many"), "model.layers='many'"),
        (lambda c: c.pop("format"), "says neither format=megadit nor _class_name; known classes: PixArt"),
        (
            lambda c: (c.pop("format"), c.update(_class_name="UNet")),
            "is a UNet; known classes: PixArtTransformer2DModel",
        ),
    ],
)
def test_a_config_of_no_network_of_ours_is_refused(change, message, run, tmp_path):
    export(run, tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    change(config)
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        import_weights(tmp_path / "first", tmp_path / "out", silent)
    assert str(tmp_path / "first") in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_only_an_export_is_overwritten_and_only_when_asked_to(run, tmp_path):
    export(run, tmp_path / "out", max_shard_bytes=100_000)
    with pytest.raises(ValueError, match="is there already, and not empty"):
        export(run, tmp_path / "out")
    export(run, tmp_path / "out", overwrite=True)
    assert sorted(files_in(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.model"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = files_in(tmp_path / "out")
    with pytest.raises(ValueError, match="is there already, and not empty"):
        export(run, tmp_path / "out", overwrite=True)
    assert files_in(tmp_path / "out") == before
    with pytest.raises(ValueError, match="is there already, and not empty"):
        export(run, run, overwrite=True)


def test_a_truncated_source_is_refused_before_anything_is_written(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    (file,) = latest(copied / "checkpoints").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{file} has .* bytes, not the"):
        export(copied, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_says_how_many_images_of_a_batch_compete(tmp_path):
    """It has no section data, which says how many a batch has."""
    make_run(tmp_path / "run", "model.routing_group=batch", "data.micro_batch=4", kinds=("ema",))
    export(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["routing_group"] == 4
    import_weights(tmp_path / "out", tmp_path / "in", silent)
    assert read_config(tmp_path / "in")["model"]["routing_group"] == 4
