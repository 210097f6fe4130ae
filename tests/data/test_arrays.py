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
