"""The 1,797 scans: what is held out stays unseen, and captions say what the scan shows."""

import re

import pytest
import torch
from sklearn.datasets import load_digits

from megadit.data.digits import HELDOUT_TEMPLATES, TRAIN_TEMPLATES, WORDS, Digits, render
from megadit.runtime.seed import stream

SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def digits():
    return {split: Digits(split) for split in SPLITS}


def named_digit(caption):
    """The one digit that a caption names, as word or numeral."""
    found = [WORDS.index(word) for word in re.findall(r"[a-z]+", caption) if word in WORDS]
    found += [int(numeral) for numeral in re.findall(r"\d+", caption)]
    assert len(found) == 1, caption
    return found[0]


def scans_of(images, labels):
    """Each scan as bytes with its label; no two of the 1,797 are equal."""
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def test_the_splits_are_disjoint_and_together_all_scans(digits):
    raw = load_digits()
    every = scans_of(torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1, raw.target)
    assert len(every) == 1797
    train, heldout = (scans_of(digits[split].images_NCHW, digits[split].labels_N) for split in SPLITS)
    assert train | heldout == every
    assert not train & heldout
    assert (len(digits["train"]), len(digits["heldout"])) == (1438, 359)


def test_the_split_does_not_change_from_call_to_call(digits):
    for split in SPLITS:
        assert torch.equal(Digits(split).images_NCHW, digits[split].images_NCHW)


@pytest.mark.parametrize("split", SPLITS)
def test_every_digit_is_in_the_split(split, digits):
    assert digits[split].labels_N.bincount(minlength=10).min() >= len(digits[split]) / 10 / 2


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_in_minus_one_to_one(split, digits):
    images = digits[split].images(torch.arange(len(digits[split])))
    assert images.shape[1:] == digits[split].image_shape == (1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)


def test_templates_are_disjoint_also_as_captions(digits):
    assert len({*TRAIN_TEMPLATES, *HELDOUT_TEMPLATES}) == len(TRAIN_TEMPLATES) + len(HELDOUT_TEMPLATES)
    assert not set(digits["train"].corpus()) & set(digits["heldout"].corpus())


@pytest.mark.parametrize("template", TRAIN_TEMPLATES + HELDOUT_TEMPLATES)
def test_a_template_names_the_digit_it_is_rendered_for(template):
    assert [named_digit(render(template, digit)) for digit in range(10)] == list(range(10))


@pytest.mark.parametrize("split", SPLITS)
def test_captions_name_the_digit_of_their_scan(split, digits):
    data = digits[split]
    captions = [data.caption(index, stream(0, index)) for index in range(len(data))]
    assert [named_digit(caption) for caption in captions] == data.labels_N.tolist()
    assert set(captions) <= set(data.corpus())


@pytest.mark.parametrize("split", SPLITS)
def test_every_template_is_used_and_the_generator_alone_decides(split, digits):
    data = digits[split]
    captions = [data.caption(0, stream(0, i)) for i in range(300)]
    assert len(set(captions)) == len(data.templates)
    assert captions == [data.caption(0, stream(0, i)) for i in range(300)]


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_turn_through_the_digits_then_the_templates(split, digits):
    templates = digits[split].templates
    prompts = digits[split].prompts(10 * len(templates) + 3)
    assert [named_digit(prompt) for prompt in prompts] == [i % 10 for i in range(len(prompts))]
    assert prompts[:20] == [render(template, digit) for template in templates[:2] for digit in range(10)]
    assert prompts[-3:] == prompts[:3]


@pytest.mark.parametrize("split", SPLITS)
def test_told_by_class_the_same_scans_are_captioned_with_their_digit(split, digits):
    data, by_class = digits[split], Digits(split, "class")
    assert torch.equal(by_class.images_NCHW, data.images_NCHW)
    captions = [by_class.caption(index, stream(0, index)) for index in range(len(data))]
    assert captions == [str(label) for label in data.labels_N.tolist()]
    assert by_class.corpus() == [str(digit) for digit in range(10)]
    assert by_class.prompts(13) == [str(i % 10) for i in range(13)]
