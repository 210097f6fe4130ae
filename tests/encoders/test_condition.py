"""Prompts to what the network is told: captions as tokens or states, classes as numbers, what stands for nothing."""

import subprocess
import sys

import pytest
import torch

from megadit.encoders.condition import Captions, FrozenCaptions, Labels, Told
from megadit.encoders.frozen_text import FrozenText
from megadit.encoders.tokenizer import Tokenizer
from tools import tiny_encoders as tiny

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


PROMPTS = ["a red cat", "", "a small bird on a stone in the river"]
LONG = " ".join(["the horse"] * 20)  # 41 tokens of T5's, 42 of CLIP's


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Kind -> a frozen encoder: T5 that reads 24 tokens, CLIP that reads 24 and one that reads 32."""
    t5, clip = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("clip")
    tiny.make_t5(t5)
    tiny.make_clip(clip)
    return {
        "t5": FrozenText.load("t5", str(t5), LENGTH, "cpu", torch.float64),
        "clip": FrozenText.load("clip", str(clip), LENGTH, "cpu", torch.float64),
        "pooling": FrozenText.load("clip", str(clip), 32, "cpu", torch.float64),
    }


@pytest.mark.parametrize("kinds", [("t5",), ("clip",), ("t5", "pooling")])
def test_frozen_captions_are_the_firsts_states_and_the_lasts_pooled_vector(encoders, kinds):
    frozen = FrozenCaptions([encoders[kind] for kind in kinds])
    told, said = frozen.encode(PROMPTS), encoders[kinds[0]].encode(PROMPTS)
    assert torch.equal(told.pop("text_states_BLC"), said.states_BLC)
    assert torch.equal(told.pop("text_mask_BL"), said.mask_BL)
    if kinds != ("t5",):
        assert torch.equal(told.pop("text_pooled_BP"), encoders[kinds[-1]].encode(PROMPTS).pooled_BP)
    assert told == {}


@pytest.mark.parametrize("kinds", [("t5",), ("clip",), ("t5", "pooling")])
def test_nothing_is_the_encoders_own_empty_caption(encoders, kinds):
    frozen = FrozenCaptions([encoders[kind] for kind in kinds])
    empty = frozen.encode(["", "a red cat"])
    assert frozen.nothing.keys() == empty.keys()
    for key, value in frozen.nothing.items():
        assert len(value) == 1
        torch.testing.assert_close(value[0], empty[key][0], rtol=0, atol=1e-6)
    assert frozen.nothing["text_mask_BL"].sum() == (1 if kinds[0] == "t5" else 2)


def test_frozen_captions_that_are_cut_are_warned_of(encoders):
    t5, pooling = encoders["t5"], encoders["pooling"]
    frozen = FrozenCaptions([t5, pooling])
    assert frozen.warnings(PROMPTS) == []
    assert frozen.warnings([*PROMPTS, LONG]) == [
        f"the prompt {LONG!r} is cut to the {length} tokens that {name} reads"
        for length, name in ((24, t5.identity["name"]), (32, pooling.identity["name"]))
    ]
    assert frozen.encode([LONG])["text_mask_BL"].all()


def test_frozen_captions_that_are_too_long_can_be_refused(encoders):
    frozen = FrozenCaptions([encoders["t5"]], too_long="error")
    assert frozen.encode(PROMPTS)["text_mask_BL"].shape == (3, LENGTH)
    with pytest.raises(ValueError) as refused:
        frozen.encode([*PROMPTS, LONG])
    assert f"the caption {LONG!r} is longer than the 24 tokens that are read" in str(refused.value)
    assert "text.too_long=cut" in str(refused.value)
    assert frozen.warnings([LONG]) == []


def test_what_only_summarises_may_be_cut_though_states_may_not(encoders):
    between = " ".join(["the horse"] * 8)  # 17 and 18 tokens
    short = FrozenText("clip", encoders["clip"].network, encoders["clip"].tokenizer, 12, {"name": "short"})
    frozen = FrozenCaptions([encoders["t5"], short], too_long="error")
    assert frozen.encode([between])["text_pooled_BP"].shape == (1, 24)
    assert frozen.warnings([between]) == [f"the prompt {between!r} is cut to the 12 tokens that short reads"]


def test_training_needs_neither_diffusers_nor_transformers():
    """They would cost seconds at every start, and a machine that trains need not have them."""
    code = """
import sys
import megadit.encoders.autoencoder, megadit.encoders.condition, megadit.training.start
print([name for name in ("diffusers", "transformers", "tokenizers", "huggingface_hub") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


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


def test_prompts_that_were_read_are_not_read_again():
    labels = Labels(10)
    told = Told(labels, ["7", "3"])
    assert torch.equal(told.encode(["7", "3"])["labels_B"], torch.tensor([7, 3]))
    assert told.nothing is labels.nothing and told.warnings(["7", "3"]) == []
    told.check(["7", "3"])
    with pytest.raises(AssertionError, match="other prompts"):
        told.encode(["3", "7"])
    with pytest.raises(ValueError, match="'ten' is not a class"):
        Told(labels, ["ten"])


def test_what_means_nothing_is_refused_without_reading_the_rest(captions):
    captions.check(["", "any text " * 50])
    Labels(10).check(["3", " 9 "])
    with pytest.raises(ValueError, match="prompt '10' is not a class; write its number, 0 to 9"):
        Labels(10).check(["3", "10"])
