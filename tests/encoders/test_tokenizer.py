"""Captions to ids: training, encoding, and what is refused."""

import io

import pytest
import sentencepiece
import torch

from megadit.encoders.tokenizer import BEGIN, END, PADDING, UNKNOWN, Tokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CORPUS = [template.format(digit) for digit in DIGITS for template in ("a handwritten {}", "the digit {} in ink", "{}")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CORPUS, 60)


def test_training_is_deterministic(tokenizer):
    assert Tokenizer.train(list(CORPUS), 60).serialized == tokenizer.serialized


def test_a_vocabulary_is_an_upper_bound(tokenizer):
    assert 20 < len(tokenizer) <= 60
    assert len(Tokenizer.train(CORPUS, 5000)) < 5000


def test_byte_pairs_keep_the_words_of_a_small_corpus_whole(tokenizer):
    """A unigram model spells them: each word occurs once among the words that it looks for pieces in."""
    whole = Tokenizer.train(CORPUS, 160, "bpe")
    assert Tokenizer.train(list(CORPUS), 160, "bpe").serialized == whole.serialized
    mask = {
        kind: model.encode(["the digit seven in ink"], 40)[1].sum()
        for kind, model in (("bpe", whole), ("unigram", tokenizer))
    }
    assert mask["bpe"] == 5 + 2 < mask["unigram"]


def test_ids_are_within_range_and_the_mask_covers_them(tokenizer):
    ids, mask = tokenizer.encode(CORPUS, 40)
    assert ids.shape == mask.shape == (30, 40)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert ids.min() >= 0 and ids.max() < len(tokenizer)
    for row, tokens in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        pieces = row[1 : tokens - 1]
        assert row[0] == BEGIN and row[tokens - 1] == END and row[tokens:] == [PADDING] * (40 - tokens)
        assert pieces and all(piece > END for piece in pieces)
    assert torch.equal(mask, ids != PADDING)
    assert torch.all(mask[:, :-1] >= mask[:, 1:])  # tokens first, then padding


def test_captions_differ_as_their_ids_do(tokenizer):
    ids, _ = tokenizer.encode(CORPUS, 40)
    assert len({tuple(row) for row in ids.tolist()}) == len(CORPUS)
    alone, _ = tokenizer.encode(CORPUS[7:8], 40)
    assert torch.equal(alone[0], ids[7])


def test_the_empty_caption_is_begin_and_end(tokenizer):
    ids, mask = tokenizer.encode([""], 5)
    assert ids.tolist() == [[BEGIN, END, PADDING, PADDING, PADDING]]
    assert mask.tolist() == [[True, True, False, False, False]]


def test_an_unseen_character_is_unknown_but_not_padding(tokenizer):
    ids, mask = tokenizer.encode(["七"], 6)
    assert UNKNOWN in ids[0].tolist()
    assert mask.sum() >= 3


@pytest.mark.parametrize("length", [2, 3, 6])
def test_a_long_caption_is_cut_and_still_ends(tokenizer, length):
    caption = "the digit seven in ink"
    whole = tokenizer.encode([caption], 40)[0][0].tolist()
    ids, mask = tokenizer.encode([caption], length)
    assert ids.tolist() == [[*whole[: length - 1], END]]
    assert mask.all()


def test_too_long_names_what_encode_would_cut(tokenizer):
    caption = "the digit seven in ink"
    tokens = int(tokenizer.encode([caption], 40)[1].sum())
    assert tokenizer.too_long([caption, "one"], tokens) == []
    assert tokenizer.too_long([caption, ""], tokens - 1) == [caption]


def test_a_vocabulary_smaller_than_the_characters_is_refused():
    with pytest.raises(ValueError, match=r"text\.vocabulary=8 cannot hold the captions' pieces"):
        Tokenizer.train(CORPUS, 8)


def test_a_file_gives_back_the_same_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.serialized)
    loaded = Tokenizer.load(path)
    assert loaded.serialized == tokenizer.serialized and len(loaded) == len(tokenizer)
    assert torch.equal(loaded.encode(CORPUS, 40)[0], tokenizer.encode(CORPUS, 40)[0])


@pytest.mark.parametrize("content", [b"not a model " * 20, b"\0", b"", None], ids=["text", "byte", "empty", "missing"])
def test_what_cannot_be_loaded_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^tokenizer {path}: "):
        Tokenizer.load(path)


def test_a_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^tokenizer {tmp_path}: Is a directory"):
        Tokenizer.load(tmp_path)


def train_with_ids(**ids):
    """A sentencepiece model whose special pieces have other ids than ours."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2, **ids
    )
    return model.getvalue()


def test_a_given_model_keeps_its_own_special_pieces():
    """T5's: padding 0, end 1, unknown 2 and no begin."""
    tokenizer = Tokenizer(train_with_ids(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    ids, mask = tokenizer.encode([CORPUS[0], ""], 60)
    count = int(mask[0].sum())
    assert ids[0, count - 1] == 1 and ids[0, count:].eq(0).all() and (ids[0, : count - 1] > 2).all()
    assert ids[1].tolist() == [1] + [0] * 59 and mask[1].tolist() == [True] + [False] * 59


def test_a_model_without_padding_is_refused():
    with pytest.raises(ValueError, match="no padding or no end piece"):
        Tokenizer(train_with_ids(pad_id=-1))
