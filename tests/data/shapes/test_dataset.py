"""Scenes as the loader reads them."""

import dataclasses

import pytest
import torch

from megadit.data.loader import DataConfig, Loader, open_dataset
from megadit.data.shapes.captions import request_of
from megadit.data.shapes.dataset import Shapes
from megadit.data.shapes.drawing import draw
from megadit.data.shapes.judge import judge
from megadit.data.shapes.scene import TASKS, TRAINED, scene
from megadit.encoders.condition import Captions
from megadit.encoders.tokenizer import Tokenizer
from megadit.runtime.seed import stream

CONFIG = DataConfig(kind="shapes", resolution=32, tasks=("colors", "position"))


def to_bytes(image_CHW):
    return ((image_CHW + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_images_are_the_scenes_and_captions_say_what_they_show():
    train = open_dataset(CONFIG, "train")
    assert train.image_shape == (3, 32, 32) and train.is_endless
    ids = torch.tensor([0, 1, 2**40, 7])
    images = train.images(ids)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32 and images.abs().max() <= 1
    for index, image in zip(ids.tolist(), images, strict=True):
        assert (to_bytes(image) == draw(scene("train", index, CONFIG.tasks).things, 32)).all()
        caption = train.caption(index, stream(0, "caption", index))
        assert judge(to_bytes(image), request_of(caption)).right


def test_the_training_split_has_no_end_and_the_other_is_another():
    heldout = open_dataset(CONFIG, "heldout")
    assert len(heldout) == 600 and not heldout.is_endless
    train = open_dataset(CONFIG, "train").images(torch.arange(40))
    assert not any(torch.equal(a, b) for a in train for b in heldout.images(torch.arange(40)))


def test_the_corpus_is_what_training_shows_and_prompts_take_turns():
    corpus = Shapes("train", 32).corpus()
    assert {request_of(caption) for caption in corpus} == {r for task in TASKS for r in TRAINED[task]}
    prompts = Shapes("heldout", 32, CONFIG.tasks).prompts(6)
    assert [request_of(prompt).task for prompt in prompts] == ["colors", "position"] * 3


def test_few_shapes_are_all_that_is_drawn_and_asked_for():
    few = ("square", "cross", "ring")
    config = dataclasses.replace(CONFIG, shapes=few)
    for split in ("train", "heldout"):
        scenes = [open_dataset(config, split).scene(index) for index in range(60)]
        assert {thing.shape for each in scenes for thing in each.things} == {*few}
    said = {thing.shape for caption in open_dataset(config, "train").corpus() for thing in request_of(caption).things}
    assert said == {*few}


@pytest.mark.parametrize("size", [1, 4])
def test_ranks_read_consecutive_scenes_of_each_step(size):
    train = open_dataset(CONFIG, "train")
    condition = Captions(Tokenizer.train(train.corpus(), 160), 24)
    batches = [Loader(train, condition, 0, 8, rank, size).batch(5) for rank in range(size)]
    assert torch.cat([batch.sample_ids_B for batch in batches]).tolist() == list(range(32, 40))
    assert torch.equal(torch.cat([batch.latents_BCHW for batch in batches]), train.images(torch.arange(32, 40)))


def test_bad_input_is_refused_by_key():
    with pytest.raises(ValueError, match="data.resolution=16 is too small for shapes; use 32 or more"):
        open_dataset(DataConfig(kind="shapes", resolution=16), "train")
    with pytest.raises(ValueError, match=r"data.shapes=\['ring'\] are too few for data.tasks=position; name more of"):
        open_dataset(dataclasses.replace(CONFIG, shapes=("ring",)), "train")
    with pytest.raises(ValueError, match="data.kind=shapes has captions and no classes; use model.conditioning=text"):
        open_dataset(CONFIG, "train", "class")
