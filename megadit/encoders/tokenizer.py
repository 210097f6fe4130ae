"""Captions to token ids with sentencepiece, T5's tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

PADDING, UNKNOWN, BEGIN, END = 0, 1, 2, 3


class Tokenizer:
    """A sentencepiece model: text in, ids and mask of a fixed length out."""

    def __init__(self, serialized: bytes) -> None:
        """`serialized` is the content of a sentencepiece `.model` file. Raises ValueError if it is not one."""
        self.serialized = serialized
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"not a sentencepiece model: {error}") from error

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
    def train(cls, sentences: Iterable[str], vocabulary: int) -> Tokenizer:
        """A unigram model of at most `vocabulary` pieces; the same sentences give the same model.

        Raises ValueError when `vocabulary` is too small for the characters that occur.
        """
        model = io.BytesIO()
        train = partial(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=iter(sentences),
            model_writer=model,
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
        return [text for text in texts if len(self._processor.encode(text)) > length - 2]

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids [B, length], int64, and mask [B, length], True at tokens. A longer text is cut; it still ends in END.

        The empty text is (BEGIN, END): the caption of the unconditional branch.
        """
        ids = torch.full((len(texts), length), PADDING)
        for row, pieces in zip(ids, self._processor.encode(list(texts)), strict=True):
            tokens = [BEGIN, *pieces[: length - 2], END]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, ids != PADDING
