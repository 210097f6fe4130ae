"""What a network is told to draw: captions as their tokens, or classes as their numbers.

A prompt is text in both cases; a class's is its number, such as "3".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from megadit.encoders.tokenizer import Tokenizer

Conditioning = Literal["text", "class"]


class Condition(Protocol):
    """From prompts to the keyword arguments that tell the network what to draw.

    nothing: those of one sample that is told nothing, [1, ...]: what guidance steers away from.
    """

    nothing: dict[str, Tensor]

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors with the prompts along dimension 0. Raises ValueError for a prompt that means nothing."""

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """What someone who wrote these prompts should know."""


class Captions:
    """text_ids_BL, int64, and text_mask_BL, True at tokens; nothing is the empty caption."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        """`length`: tokens that the network reads of a caption."""
        self.tokenizer, self.length = tokenizer, length
        self.nothing = self.encode([""])

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Any text will do; a longer one is cut."""
        ids_BL, mask_BL = self.tokenizer.encode(prompts, self.length)
        return {"text_ids_BL": ids_BL, "text_mask_BL": mask_BL}

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Which prompts are cut."""
        cut = self.tokenizer.too_long(prompts, self.length)
        return [f"the prompt {prompt!r} is cut to the {self.length} tokens that the model reads" for prompt in cut]


class Labels:
    """labels_B, int64, from 0 to classes - 1; nothing is a class of its own, the number `classes` (DiT's)."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.nothing = {"labels_B": torch.tensor([classes])}
        self._labels = {str(label): label for label in range(classes)}

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Raises ValueError naming a prompt that is not the number of a class."""
        for prompt in prompts:
            if prompt.strip() not in self._labels:
                raise ValueError(f"prompt {prompt!r} is not a class; write its number, 0 to {self.classes - 1}")
        labels = [self._labels[prompt.strip()] for prompt in prompts]
        return {"labels_B": torch.tensor(labels, dtype=torch.int64)}

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """None: a number is read as it is, or refused."""
        return []
