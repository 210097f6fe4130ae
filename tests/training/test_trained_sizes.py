"""Which sizes a run was trained on, and what is said of others."""

import shutil

import pytest

from megadit.training.config import load_config
from megadit.training.trained_sizes import trained_sizes, untrained_size
from tests.data.encoded_sets import write_set


def digits():
    return load_config("tests/configs/tiny.yaml")


def shards(*folders):
    sets = ", ".join(f"{folder}: 1.0" for folder in folders)
    where = [f"data.sets={{{sets}}}"] if len(folders) > 1 else [f"data.path={folders[0]}"]
    return load_config("tests/configs/tiny.yaml", ["data.kind=shards", "model.image_size=4", *where])


def test_digits_have_the_models_square():
    assert trained_sizes(digits()) == [(8, 8)]
    assert untrained_size(digits(), None) is None
    assert untrained_size(digits(), (8, 8)) is None
    expected = "the model was not trained on pictures of 12x8, but of 8x8; expect worse ones"
    assert untrained_size(digits(), (12, 8)) == expected


def test_shards_have_the_buckets_of_their_manifests(tmp_path):
    write_set(tmp_path / "a", {(64, 96): 3})
    write_set(tmp_path / "b", {(64, 64): 2, (64, 96): 2})
    assert trained_sizes(shards(tmp_path / "a")) == [(4, 6)]
    both = shards(tmp_path / "a", tmp_path / "b")
    assert trained_sizes(both) == [(4, 4), (4, 6)]
    assert untrained_size(both, None, 16) is untrained_size(both, (4, 6), 16) is None
    wrong = untrained_size(both, (6, 4), 16)
    assert wrong == "the model was not trained on pictures of 96x64, but of 64x64, 64x96; expect worse ones"
    wrong = untrained_size(shards(tmp_path / "a"), None, 16)
    assert wrong == "the model was not trained on pictures of 64x64, but of 64x96; expect worse ones"


def test_without_the_data_only_the_models_square_is_taken_for_granted(tmp_path):
    write_set(tmp_path / "gone", {(64, 96): 3})
    config = shards(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(ValueError, match="gone"):
        trained_sizes(config)
    assert untrained_size(config, None) is untrained_size(config, (4, 4)) is None
    said = untrained_size(config, (4, 6), 16)
    assert said.startswith("pictures of 64x96: the sizes that the model was trained on are not known (data set ")
