"""What a run reads before it starts: captions with a tokenizer, or classes that the model has room for."""

import numpy as np
import pytest

from megadit.encoders.condition import Captions, Labels
from megadit.training.build import read_inputs
from megadit.training.config import load_config

CONFIG = "tests/configs/tiny.yaml"


def inputs_of(*overrides):
    return read_inputs(load_config(CONFIG, overrides))


def by_class(classes, path=None):
    """The inputs of a class-conditional run, on digits or on a file."""
    data = [] if path is None else ["data.kind=arrays", f"data.path={path}"]
    return inputs_of("model.conditioning=class", f"model.classes={classes}", *data)


def write(path, labels):
    np.savez(path, images=np.zeros((len(labels), 8, 8)), labels=np.array(labels))
    return path


def test_captions_come_with_a_tokenizer_of_the_training_splits_corpus():
    inputs = inputs_of()
    assert isinstance(inputs.condition, Captions)
    assert inputs.condition.length == 28
    assert inputs.condition.warnings(inputs.train.corpus()) == []
    assert "handwritten" in inputs.train.prompts(40)[20]


@pytest.mark.parametrize("classes", [10, 12])
def test_classes_come_without_one(classes):
    inputs = by_class(classes)
    assert isinstance(inputs.condition, Labels)
    assert inputs.condition.classes == classes
    assert inputs.train.corpus() == inputs.heldout.corpus() == [str(digit) for digit in range(10)]


def test_too_few_classes_for_the_digits_are_refused():
    with pytest.raises(ValueError, match="data.kind=digits has classes up to 9.*set model.classes=10"):
        by_class(9)


@pytest.mark.parametrize("place", range(10))
def test_a_label_without_room_is_refused_by_its_file_whatever_its_split(place, tmp_path):
    labels = [2] * 10
    labels[place] = 7
    path = write(tmp_path / "mine.npz", labels)
    assert by_class(8, path).condition.classes == 8
    with pytest.raises(ValueError, match=f"{path} has classes up to 7, model.classes=7.*set model.classes=8"):
        by_class(7, path)
