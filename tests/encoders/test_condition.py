"""Prompts to what the network is told: captions as tokens, classes as numbers, and what stands for nothing."""

import pytest
import torch

from megadit.encoders.condition import Captions, Labels
from megadit.encoders.tokenizer import Tokenizer

CORPUS = [f"a handwritten {word}" for word in ("zero", "one", "two", "three", "four", "five")]
LENGTH = 24


@pytest.fixture(scope="module")
def captions():
    return Captions(Tokenizer.train(CORPUS, 40), LENGTH)


def test_captions_are_the_tokenizers_ids_and_mask(captions):
    told = captions.encode(CORPUS)
    ids, mask = captions.tokenizer.encode(CORPUS, LENGTH)
    assert told.keys() == {"text_ids_BL", "text_mask_BL"}
    assert torch.equal(told["text_ids_BL"], ids) and torch.equal(told["text_mask_BL"], mask)


def test_no_caption_is_the_empty_one(captions):
    empty = captions.encode([""])
    assert empty.keys() == captions.nothing.keys()
    for key, value in captions.nothing.items():
        assert torch.equal(value, empty[key]), key
    assert captions.nothing["text_mask_BL"].sum() == 2, "begin and end"


def test_a_caption_that_is_cut_is_warned_of(captions):
    short = Captions(captions.tokenizer, int(captions.encode([CORPUS[0]])["text_mask_BL"].sum()) - 1)
    (warning,) = short.warnings(["one", CORPUS[0]])
    assert repr(CORPUS[0]) in warning and f"{short.length} tokens" in warning
    assert captions.warnings([CORPUS[0]]) == []


def test_a_class_is_its_number():
    labels = Labels(12)
    told = labels.encode(["3", "0", " 11\n", "3"])
    assert told.keys() == {"labels_B"}
    assert told["labels_B"].dtype == torch.int64
    assert told["labels_B"].tolist() == [3, 0, 11, 3]
    assert labels.warnings(["3"]) == []


def test_no_class_is_the_one_after_the_last():
    assert Labels(12).nothing.keys() == Labels(12).encode(["0"]).keys()
    assert Labels(12).nothing["labels_B"].tolist() == [12]
    assert Labels(12).nothing["labels_B"].dtype == torch.int64


@pytest.mark.parametrize("prompt", ["12", "-1", "+3", "3.0", "1_0", "seven", "a handwritten seven", "", "03", "٣"])
def test_what_is_not_the_number_of_a_class_is_refused(prompt):
    with pytest.raises(ValueError) as refused:
        Labels(12).encode(["3", prompt, "4"])
    assert f"prompt {prompt!r} is not a class; write its number, 0 to 11" in str(refused.value)
