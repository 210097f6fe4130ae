"""Captions to token ids with sentencepiece, T5's tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import sentencepiece
import torch
from torch import Tensor

Pieces = Literal["unigram", "bpe"]

PADDING, UNKNOWN, BEGIN, END = 0, 1, 2, 3  # of the models that we train; a given one says its own


class Tokenizer:
    """A sentencepiece model: text in, ids and mask of a fixed length out."""

    def __init__(self, serialized: bytes) -> None:
        """`serialized` is the content of a sentencepiece `.model` file. Raises ValueError if it is not one."""
        self.serialized = serialized
        if not serialized:  # sentencepiece would load nothing and say nothing
            raise ValueError("not a sentencepiece model: it is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"not a sentencepiece model: {error}") from error
        self._padding, self._end = self._processor.pad_id(), self._processor.eos_id()
        if min(self._padding, self._end) < 0:
            raise ValueError("the sentencepiece model has no padding or no end piece; train it with --pad_id=0")
        begin = self._processor.bos_id()
        self._begin = [begin] if begin >= 0 else []  # T5's has none

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Raises ValueError that names the file when it is missing or is not a sentencepiece model."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"tokenizer {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"tokenizer {path}: {error}") from error

    @classmethod
    def train(cls, sentences: Iterable[str], vocabulary: int, pieces: Pieces = "unigram") -> Tokenizer:
        """A model of at most `vocabulary` pieces; the same sentences give the same model.

        A unigram model, T5's kind, counts each different word once when it looks for pieces: of a corpus of few words
        it spells most. Byte-pair encoding counts occurrences, and keeps frequent words whole.

        Raises ValueError when `vocabulary` is too small for the characters that occur.
        """
        model = io.BytesIO()
        train = partial(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=pieces,
            vocab_size=vocabulary,
            hard_vocab_limit=False,  # a small corpus has fewer pieces
            character_coverage=1.0,
            num_threads=1,  # more would make the pieces depend on the machine
            pad_id=PADDING,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            minloglevel=2,
        )
        try:
            train()
        except RuntimeError as error:
            raise ValueError(f"text.vocabulary={vocabulary} cannot hold the captions' pieces: {error}") from error
        return cls(model.getvalue())

    def __len__(self) -> int:
        """The number of pieces."""
        return self._processor.get_piece_size()

    def too_long(self, texts: Iterable[str], length: int) -> list[str]:
        """Those of the texts that `encode` would cut to `length` tokens."""
        room = length - len(self._begin) - 1
        return [text for text in texts if len(self._processor.encode(text)) > room]

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids [B, length], int64, and mask [B, length], True at tokens. A longer text is cut; it still ends in the end.

        A text is (begin, its pieces, end). The empty one is the caption of the unconditional branch.
        """
        ids = torch.full((len(texts), length), self._padding)
        mask = torch.zeros((len(texts), length), dtype=torch.bool)
        for i, pieces in enumerate(self._processor.encode(list(texts))):
            tokens = [*self._begin, *pieces[: length - len(self._begin) - 1], self._end]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
        return ids, mask
