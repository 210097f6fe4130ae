"""A data set in one .npz file, grey or in colour, read and trained on."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from megadit.data.arrays import Arrays
from megadit.data.loader import DataConfig, open_dataset
from megadit.runtime.seed import stream
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_on

COUNT = 43
GREY, COLOUR = (8, 8), (3, 8, 6)


def numbered(shape):
    """Images whose pixels all equal a 64th of their number."""
    return np.broadcast_to(np.arange(COUNT).reshape(-1, *[1] * len(shape)) / 64, (COUNT, *shape))


def write(path, images, captions=None):
    captions = [f"number {i}" for i in range(len(images))] if captions is None else captions
    np.savez(path, images=images, captions=np.array(captions))
    return str(path)


@pytest.mark.parametrize(("shape", "image_shape"), [(GREY, (1, 8, 8)), (COLOUR, COLOUR)])
def test_the_splits_are_disjoint_complete_and_keep_image_and_caption_together(shape, image_shape, tmp_path):
    path = write(tmp_path / "data.npz", numbered(shape))
    train, heldout = Arrays("train", path), Arrays("heldout", path)
    assert len(heldout) == COUNT // 10
    seen = []
    for split in (train, heldout):
        images = split.images(torch.arange(len(split)))
        assert images.dtype == torch.float32
        assert images.shape[1:] == split.image_shape == image_shape
        numbers = images.flatten(1)
        assert (numbers == numbers[:, :1]).all()
        for i, number in enumerate((64 * numbers[:, 0]).int().tolist()):
            assert split.caption(i, stream(0)) == f"number {number}"
            seen.append(number)
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, np.float16])
def test_any_number_type_is_read_as_stored(dtype, tmp_path):
    images = (np.arange(COUNT * 4) % 20).reshape(COUNT, 2, 2).astype(dtype)
    split = Arrays("train", write(tmp_path / "data.npz", images))
    stored = {image.astype(np.float32).tobytes() for image in images}
    assert all(image.numpy().tobytes() in stored for image in split.images(torch.arange(len(split))))


def test_a_few_samples_still_hold_one_out(tmp_path):
    path = write(tmp_path / "data.npz", np.zeros((3, 2, 2)))
    assert (len(Arrays("train", path)), len(Arrays("heldout", path))) == (2, 1)


def test_corpus_and_prompts_are_the_splits_own_captions(tmp_path):
    path = write(tmp_path / "data.npz", numbered(GREY))
    train, heldout = Arrays("train", path), Arrays("heldout", path)
    assert sorted({*train.corpus(), *heldout.corpus()}) == sorted(f"number {i}" for i in range(COUNT))
    assert heldout.prompts(6) == [*heldout.corpus(), *heldout.corpus()[:2]]


def test_open_dataset_opens_the_file_that_data_path_names(tmp_path):
    path = write(tmp_path / "data.npz", numbered(COLOUR))
    dataset = open_dataset(DataConfig(kind="arrays", path=path), "heldout")
    assert dataset.image_shape == COLOUR
    assert dataset.corpus() == Arrays("heldout", path).corpus()


def write_classes(path, labels):
    """A file without captions, in which the pixels of an image equal a 64th of its label."""
    labels = np.array(labels)
    images = np.broadcast_to(labels.astype(np.float32).reshape(-1, 1, 1) / 64, (len(labels), *GREY))
    np.savez(path, images=images, labels=labels)
    return str(path)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_told_by_class_an_image_is_captioned_with_its_label(dtype, tmp_path):
    path = write_classes(tmp_path / "data.npz", np.arange(COUNT, dtype=dtype) % 12)
    seen = []
    for split in (Arrays("train", path, "class"), Arrays("heldout", path, "class")):
        numbers = (64 * split.images(torch.arange(len(split)))[:, 0, 0, 0]).int().tolist()
        captions = [split.caption(i, stream(0)) for i in range(len(split))]
        assert captions == split.corpus() == [str(number) for number in numbers]
        assert split.prompts(len(split) + 2) == [*captions, *captions[:2]]
        seen += numbers
    assert sorted(seen) == sorted(i % 12 for i in range(COUNT))


def test_a_file_may_hold_both_captions_and_labels_and_the_split_is_the_same(tmp_path):
    path = str(tmp_path / "data.npz")
    captions = np.array([f"number {i}" for i in range(COUNT)])
    np.savez(path, images=numbered(GREY), captions=captions, labels=np.arange(COUNT))
    told, by_class = Arrays("train", path), open_dataset(DataConfig(kind="arrays", path=path), "train", "class")
    assert torch.equal(told.images_NCHW, by_class.images_NCHW)
    assert told.corpus() == [f"number {label}" for label in by_class.corpus()]


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (
            {"captions": np.array(["a"] * 4)},
            "labels is not a file in the archive (the arrays needed are images and labels)",
        ),
        ({"labels": np.arange(3)}, "labels [N] integers; got images (4, 8, 8) and labels (3,) of type int64"),
        ({"labels": np.zeros(4)}, "labels [N] integers; got images (4, 8, 8) and labels (4,) of type float64"),
        ({"labels": np.array(["1"] * 4)}, "labels [N] integers"),
        ({"labels": np.zeros(4, dtype=bool)}, "labels [N] integers"),
        ({"labels": np.array([0, 1, -2, 1])}, "labels go down to -2; classes count from 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_file_and_key(arrays, expected, tmp_path):
    path = str(tmp_path / "data.npz")
    np.savez(path, images=np.zeros((4, *GREY)), **arrays)
    with pytest.raises(ValueError) as refused:
        Arrays("train", path, "class")
    assert f"data.path={path}: " in str(refused.value) and expected in str(refused.value)


def rgb(images):
    """A scan in three inks."""
    return np.stack([images, -images, images / 2], axis=1)


@pytest.mark.parametrize(
    ("colour", "overrides"), [(lambda images: images, []), (rgb, ["model.channels=3"])], ids=["grey", "rgb"]
)
def test_a_training_on_an_npz_of_digits_runs_to_its_end(colour, overrides, tmp_path):
    raw = load_digits()
    path = write(tmp_path / "mine.npz", colour(raw.images / 8 - 1), [f"my {label}" for label in raw.target])
    command = ["--config", "tests/configs/tiny.yaml", "data.kind=arrays", f"data.path={path}", "run.steps=2"]
    command += ["log.evaluate_every=2", "log.sample_every=2", "data.global_batch=64", "data.micro_batch=32"]
    ((status, errors),) = train_on(1, *command, f"run.dir={tmp_path / 'run'}", *overrides)
    assert status == 0, errors
    lines = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [line["step"] for line in lines] == [1, 2]
    assert 0 < lines[1]["heldout_loss"] < 10
    assert (tmp_path / "run" / "samples" / "step_00000002.png").exists()
