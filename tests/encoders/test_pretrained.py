"""Where encoders are found: folders, the Hub's cache, and what is said when they are not there."""

import json
import shutil
import socket
import sys

import pytest
import torch

from megadit.encoders.autoencoder import Autoencoder
from megadit.encoders.frozen_text import FrozenText
from megadit.encoders.pretrained import Source, fingerprint, read_json, weight_files
from tests.encoders import tiny

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
NAME = "someone/pipeline"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in diffusers' layout, with FLUX's encoders: CLIP first, T5 second."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    tiny.make_autoencoder(folder / "vae")
    tiny.make_clip(folder / "text_encoder", projection=False, tokenizer=folder / "tokenizer")
    tiny.make_t5(folder / "text_encoder_2", tokenizer=folder / "tokenizer_2")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch, pipeline):
    """A cache of the Hub that holds two commits of the pipeline: `main` is one, and the tag `old` is the other's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--someone--pipeline"
    shutil.copytree(pipeline, model / "snapshots" / COMMIT)
    shutil.copytree(pipeline, model / "snapshots" / OLDER)
    tiny.make_autoencoder(model / "snapshots" / OLDER / "vae", seed=1)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    (model / "refs" / "old").write_text(OLDER)
    return model


@pytest.fixture
def no_network(monkeypatch):
    """Any look at the network is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def load_all(name, **options):
    return [
        Autoencoder.load(name, "cpu", torch.float32, **options),
        FrozenText.load("t5", name, 16, "cpu", torch.float32, **options),
        FrozenText.load("clip", name, 16, "cpu", torch.float32, **options),
    ]


def test_one_name_gives_a_pipelines_three_encoders_from_the_cache(cache, pipeline, no_network):
    encoders, same = load_all(NAME), load_all(str(pipeline))
    assert [encoder.identity["class"] for encoder in encoders] == ["AutoencoderKL", "T5EncoderModel", "CLIPTextModel"]
    for encoder, other in zip(encoders, same, strict=True):
        assert encoder.identity == other.identity | {"name": NAME, "revision": COMMIT}
        assert other.identity["revision"] == "" and other.identity["name"] == str(pipeline)


@pytest.mark.parametrize("revision", ["old", OLDER])
def test_a_revision_is_a_tag_or_a_commit(cache, no_network, revision):
    older = Autoencoder.load(NAME, "cpu", torch.float32, revision=revision)
    assert older.identity["revision"] == OLDER
    assert older.identity["fingerprint"] != Autoencoder.load(NAME, "cpu", torch.float32).identity["fingerprint"]


@pytest.mark.parametrize("name", ["someone/else", "t5-small"])
def test_what_is_not_here_is_not_looked_for_elsewhere(cache, no_network, name):
    with pytest.raises(ValueError) as refused:
        FrozenText.load("t5", name, 16, "cpu", torch.float32)
    message = str(refused.value)
    assert f"{name} is neither a folder nor in the Hub's cache" in message
    assert f"run `hf download {name}` where there is a network" in message and "or name a folder" in message


def test_a_revision_that_is_not_here_is_named(cache, no_network):
    with pytest.raises(ValueError, match=f"{NAME} at revision 'v2' is neither .* `hf download {NAME} --revision v2`"):
        Autoencoder.load(NAME, "cpu", torch.float32, revision="v2")


def test_a_copy_that_is_incomplete_names_the_file(cache, no_network):
    (cache / "snapshots" / COMMIT / "tokenizer_2" / "spiece.model").unlink()
    with pytest.raises(ValueError, match="tokenizer_2 has no tokenizer: neither spiece.model, nor tokenizer.json"):
        FrozenText.load("t5", NAME, 16, "cpu", torch.float32)


def test_a_download_that_fails_says_why(cache, monkeypatch):
    """Nobody listens at the port of the endpoint."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="someone/else cannot be downloaded: "):
        Source("someone/else", online=True).fetch(["config.json"])


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./models/t5", "models/t5/encoder", "a b", ""])
def test_a_path_that_is_not_there_is_no_name(name):
    with pytest.raises(ValueError, match=f"there is no folder '{name}', and a model on the Hub is named owner/model"):
        Source(name).fetch([])


def test_a_folder_has_no_revision(pipeline):
    with pytest.raises(ValueError, match="is a folder, which has no revision 'main'; name none"):
        Source(str(pipeline), "main").fetch([])


def test_a_home_is_found(pipeline, monkeypatch):
    monkeypatch.setenv("HOME", str(pipeline.parent))
    assert Source(f"~/{pipeline.name}").fetch([]) == pipeline


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_library_that_is_not_installed_is_named(pipeline, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.* install them with pip install -e '\.\[encoders\]'"):
        if package == "diffusers":
            Autoencoder.load(str(pipeline), "cpu", torch.float32)
        else:
            FrozenText.load("t5", str(pipeline), 16, "cpu", torch.float32)


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_a_damaged_config_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path} "):
        read_json(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_without_files_is_named(tmp_path, index):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{path} lists no files of weights"):
        weight_files(tmp_path, "model")


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    first = fingerprint([a, b])
    assert first == fingerprint([b, a]) and len(first) == 16 and int(first, 16) >= 0
    assert first != fingerprint([a])
    assert first != fingerprint([a, b.rename(tmp_path / "c")])
    a.write_bytes(b"two")
    b.write_bytes(b"one")
    assert fingerprint([a, b]) != first
