"""What a network is told to draw: captions as their tokens or as a frozen encoder's states, or classes as numbers.

A prompt is text in both cases; a class's is its number, such as "3".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from megadit.encoders.frozen_text import FrozenText
from megadit.encoders.tokenizer import Tokenizer

Conditioning = Literal["text", "class"]
TooLong = Literal["cut", "error"]


class Condition(Protocol):
    """From prompts to the keyword arguments that tell the network what to draw.

    nothing: those of one sample that is told nothing, [1, ...]: what guidance steers away from.
    """

    nothing: dict[str, Tensor]

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors with the prompts along dimension 0. Raises ValueError as `check`."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that means nothing. Quick: no encoder runs."""

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

    def check(self, prompts: Sequence[str]) -> None:
        """Any text will do."""

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Which prompts are cut."""
        cut = self.tokenizer.too_long(prompts, self.length)
        return [f"the prompt {prompt!r} is cut to the {self.length} tokens that the model reads" for prompt in cut]


class FrozenCaptions:
    """text_states_BLC and text_mask_BL of frozen encoders and, where one has it, text_pooled_BP: float32, but the mask.

    nothing: what they make of the empty caption.
    """

    def __init__(self, encoders: Sequence[FrozenText], too_long: TooLong = "cut") -> None:
        """`encoders`: [T5], [CLIP] or [T5, CLIP]. States are the first's, the pooled vector is the last's.

        So T5 alone has no pooled vector, and T5 with CLIP are what FLUX reads. `too_long`: what becomes of a text that
        the first cannot read whole; of the last of two only a summary is read, for which a part will do.
        """
        assert 1 <= len(encoders) <= 2, "[T5], [CLIP] or [T5, CLIP]"
        self.encoders, self.too_long = list(encoders), too_long
        self.nothing = self.encode([""])

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Any text will do. A longer one is cut, or with too_long="error" refused."""
        reader, *others = self.encoders
        self.check(prompts)
        said = reader.encode(prompts)
        pooled_BP = others[0].encode(prompts).pooled_BP if others else said.pooled_BP
        told = {"text_states_BLC": said.states_BLC, "text_mask_BL": said.mask_BL}
        return told if pooled_BP is None else told | {"text_pooled_BP": pooled_BP}

    def check(self, prompts: Sequence[str]) -> None:
        """With too_long="error" raises ValueError that names a longer text."""
        if self.too_long == "cut":
            return
        reader = self.encoders[0]
        for prompt in reader.too_long(prompts):
            raise ValueError(
                f"the caption {prompt!r} is longer than the {reader.length} tokens that are read; shorten it, set a "
                "larger text.length, or text.too_long=cut"
            )

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Which prompts an encoder cuts, where that is not an error."""
        return [
            f"the prompt {prompt!r} is cut to the {encoder.length} tokens that {encoder.identity['name']} reads"
            for encoder in self.encoders
            for prompt in encoder.too_long(prompts)
            if encoder is not self.encoders[0] or self.too_long == "cut"
        ]


class Labels:
    """labels_B, int64, from 0 to classes - 1; nothing is a class of its own, the number `classes` (DiT's)."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.nothing = {"labels_B": torch.tensor([classes])}
        self._labels = {str(label): label for label in range(classes)}

    def __len__(self) -> int:
        """The number of prompts."""
        return self.classes

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Raises ValueError naming a prompt that is not the number of a class."""
        self.check(prompts)
        labels = [self._labels[prompt.strip()] for prompt in prompts]
        return {"labels_B": torch.tensor(labels, dtype=torch.int64)}

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError naming a prompt that is not the number of a class."""
        for prompt in prompts:
            if prompt.strip() not in self._labels:
                raise ValueError(f"prompt {prompt!r} is not a class; write its number, 0 to {self.classes - 1}")

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """None: a number is read as it is, or refused."""
        return []


class Told:
    """A condition that has read its prompts already, and warned of them: whoever draws them reads nothing again."""

    def __init__(self, condition: Condition, prompts: Sequence[str]) -> None:
        """Raises ValueError as `condition.encode`."""
        self.nothing = condition.nothing
        self._prompts, self._told = list(prompts), condition.encode(prompts)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What was made of these prompts, the ones that it was made for."""
        assert list(prompts) == self._prompts, "other prompts than those that were read"
        return self._told

    def check(self, prompts: Sequence[str]) -> None:
        """They were read, so they mean something."""

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """None that is new."""
        return []
