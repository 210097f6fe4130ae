"""scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels, shipped inside the package.

One in five scans is held out, and so are some caption templates: training sees neither.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megadit.encoders.condition import Conditioning
from megadit.runtime.seed import stream

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_TEMPLATES = (
    "{word}",
    "{numeral}",
    "a handwritten {word}",
    "a handwritten {numeral}",
    "the digit {word}",
    "the digit {numeral} written by hand",
    "a scan of the number {word}",
    "the number {numeral} in ink",
    "handwriting of a {word}",
    "someone wrote the digit {word} on paper",
    "a small picture of a {numeral}",
    "a pen drawing of the number {numeral}",
    "a grey image that shows the digit {word}",
    "number {word} as a person writes it",
)
HELDOUT_TEMPLATES = (
    "a picture of the handwritten number {word}",
    "the digit {numeral} on a scan",
    "a person wrote {word}",
    "the number {numeral} drawn by hand",
)
CLASS_TEMPLATES = ("{numeral}",)  # the class is the digit
HELDOUT_FRACTION = 5  # one scan in so many
SPLIT_SEED = 20240  # the split is part of the data set, not of a run


def _scale(pixels: Tensor) -> Tensor:
    """Ink 0 to 16 -> -1 to 1."""
    return pixels / 8.0 - 1.0


@cache
def _scans() -> tuple[Tensor, Tensor]:
    """All scans [1797, 1, 8, 8] in [-1, 1] and their labels [1797]."""
    from sklearn.datasets import load_digits  # takes a second to import

    raw = load_digits()
    return _scale(torch.tensor(raw.images, dtype=torch.float32)[:, None]), torch.tensor(raw.target)


class Digits:
    """One split of the scans, "train" or "heldout", with captions from that split's templates."""

    is_endless = False

    def __init__(self, split: str, conditioning: Conditioning = "text") -> None:
        """With class conditioning a caption is the digit alone, in both splits."""
        images, labels = _scans()
        order = torch.randperm(len(labels), generator=stream(SPLIT_SEED, "split"))
        num_heldout = len(labels) // HELDOUT_FRACTION
        chosen = order[num_heldout:] if split == "train" else order[:num_heldout]
        self.images_NCHW, self.labels_N = images[chosen], labels[chosen]
        told = TRAIN_TEMPLATES if split == "train" else HELDOUT_TEMPLATES
        self.templates = told if conditioning == "text" else CLASS_TEMPLATES

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.images_NCHW.shape[1:])  # type: ignore[return-value]

    def images(self, ids_B: Tensor) -> Tensor:
        """[B, 1, 8, 8] in [-1, 1]."""
        return self.images_NCHW[ids_B]

    def caption(self, index: int, generator: torch.Generator) -> str:
        """A caption of the scan, its template drawn from `generator`."""
        template = self.templates[int(torch.randint(len(self.templates), (), generator=generator))]
        return render(template, int(self.labels_N[index]))

    def corpus(self) -> list[str]:
        """Every caption that this split can show: what its tokenizer is trained on."""
        return [render(template, digit) for template in self.templates for digit in range(10)]

    def prompts(self, count: int) -> list[str]:
        """`count` captions, digits in turn and templates in turn: for sample grids."""
        return [render(self.templates[(i // 10) % len(self.templates)], i % 10) for i in range(count)]


def render(template: str, digit: int) -> str:
    """The template's caption of a digit.

    >>> render("the digit {numeral}", 7), render("a handwritten {word}", 7)
    ('the digit 7', 'a handwritten seven')
    """
    return template.format(word=WORDS[digit], numeral=digit)
