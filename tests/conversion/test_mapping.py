"""Folders of diffusers in and out, with its own classes on the other side."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from megadit.checkpoint import load_tensors
from megadit.checkpoint.folder import latest
from megadit.conversion.export import Export, export_weights
from megadit.conversion.run_folder import import_weights
from tests.conversion.made import assert_same, make_run, read_config, silent

FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS = Export(format="diffusers")


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=16,
    )


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, num_embeds_ada_norm=5, sample_size=8
    )


@pytest.fixture(params=[pixart, dit])
def theirs(request, tmp_path):
    """A folder as diffusers saves it."""
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_there_and_back_is_the_same_bytes(theirs, tmp_path):
    import_weights(theirs, tmp_path / "run", silent)
    assert read_config(tmp_path / "run")["model"]["layers"] == 2
    export_weights(tmp_path / "run", tmp_path / "back", DIFFUSERS, silent)
    assert_same(load_file(tmp_path / "back" / FILE), load_file(theirs / FILE))
    kind = json.loads((theirs / "config.json").read_text())["_class_name"]
    network, info = {
        "PixArtTransformer2DModel": PixArtTransformer2DModel,
        "DiTTransformer2DModel": DiTTransformer2DModel,
    }[kind].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(dict(network.state_dict()), load_file(theirs / FILE))


def test_shards_are_read_and_written(theirs, tmp_path):
    import_weights(theirs, tmp_path / "run", silent)
    export_weights(tmp_path / "run", tmp_path / "back", Export(format="diffusers", max_shard_bytes=20_000), silent)
    assert len(list((tmp_path / "back").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    import_weights(tmp_path / "back", tmp_path / "again", silent)
    first, second = (load_tensors(latest(tmp_path / name / "checkpoints")) for name in ("run", "again"))
    assert_same(second, first)


def test_their_folder_may_be_exported_as_ours_at_once(theirs, tmp_path):
    export_weights(theirs, tmp_path / "out", Export(dtype=torch.float64), silent)
    import_weights(theirs, tmp_path / "run", silent)
    ours = load_tensors(latest(tmp_path / "run" / "checkpoints"))
    expected = {name.removeprefix("weight."): tensor.double() for name, tensor in ours.items()}
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_every_tensor_that_is_missing_left_over_or_of_another_shape_is_in_one_error(theirs, tmp_path):
    tensors = load_file(theirs / FILE)
    del tensors["pos_embed.proj.bias"]
    tensors["pos_embed.proj.weight"] = tensors["pos_embed.proj.weight"][:3].clone()
    tensors["lora_A"] = torch.zeros(2)
    tensors["transformer_blocks.7.attn1.to_q.weight"] = torch.zeros(2)
    save_file(tensors, theirs / FILE)
    with pytest.raises(ValueError, match="is not the .* of its config.json") as error:
        import_weights(theirs, tmp_path / "run", silent)
    kind = json.loads((theirs / "config.json").read_text())["_class_name"]
    assert str(error.value).splitlines()[1:] == [
        "  pos_embed.proj.bias: missing, of shape (16,)",
        f"  lora_A: has no place in a {kind}",
        f"  transformer_blocks.7.attn1.to_q.weight: has no place in a {kind}",
        "  pos_embed.proj.weight: shape (3, 4, 2, 2), not (16, 4, 2, 2)",
    ]
    assert not list(tmp_path.glob("run*"))


def test_a_tensor_is_left_behind_only_by_name(theirs, tmp_path):
    tensors = load_file(theirs / FILE)
    save_file(tensors | {"y_embedding": torch.zeros(2)}, theirs / FILE)
    done = import_weights(theirs, tmp_path / "run", silent, drop=["y_embedding"])
    assert "without y_embedding" in done
    export_weights(tmp_path / "run", tmp_path / "back", DIFFUSERS, silent)
    assert_same(load_file(tmp_path / "back" / FILE), tensors)
    with pytest.raises(ValueError, match="z_embedding: to be dropped, but not there"):
        import_weights(theirs, tmp_path / "other", silent, drop=["y_embedding", "z_embedding"])


def test_settings_that_do_not_map_are_refused_with_the_file(theirs, tmp_path):
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"dropout": 0.5}))
    with pytest.raises(ValueError, match=r"theirs/config\.json: .*dropout=0\.5"):
        import_weights(theirs, tmp_path / "run", silent)


def test_a_network_that_diffusers_does_not_have_is_refused_with_the_reasons(tmp_path):
    make_run(tmp_path / "run", kinds=("weight",))
    with pytest.raises(ValueError, match="is no network of diffusers") as error:
        export_weights(tmp_path / "run", tmp_path / "out", DIFFUSERS, silent)
    for name in ("PixArtTransformer2DModel", "DiTTransformer2DModel"):
        assert str(error.value).count(f"\n  this model cannot become a {name}: ") == 1
    with pytest.raises(ValueError, match="--tensor and --expert cut networks of ours"):
        export_weights(tmp_path / "run", tmp_path / "out", Export(format="diffusers", cut=True), silent)
    assert not list(tmp_path.glob("out*"))
