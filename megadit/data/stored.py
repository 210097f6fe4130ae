"""Captions that are stored in an encoded data set stand in for prompts, where no text encoder is at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megadit.data.mixture import MixedBucket, Mixture, Place, Split, padded
from megadit.data.order import within
from megadit.encoders.condition import Condition, Labels


class Numbered:
    """The held-out samples of a mixture by number, from 0; where none are held out, those to train on.

    Bucket after bucket, the largest first, and data set after data set: a bucket that is dropped at a larger batch is
    among the last, so that the numbers of the others do not depend on it.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._split: Split = "heldout" if mixture.wanted.heldout else "train"
        buckets = sorted(mixture.buckets, key=lambda bucket: -bucket.samples)
        counted = [(bucket.name, _counts(mixture, self._split, bucket.name)) for bucket in buckets]
        self._parts = [(name, dataset) for name, counts in counted for dataset in range(len(counts))]
        self._ends = np.cumsum([count for _, counts in counted for count in counts])
        self.in_largest = sum(counted[0][1])  # so many, from 0, are of the bucket of most samples

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, number: int) -> Place:
        """Where the sample is."""
        (part,), index_N = within(self._ends, np.array([number]))
        bucket, dataset = self._parts[part]
        (place,) = self.mixture.locate(self._split, dataset, bucket, index_N)
        return place


class StoredCaptions:
    """A `Condition` whose prompts are numbers of samples, see `Numbered`: what a run draws along the way, without an
    encoder.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.samples = mixture, Numbered(mixture)
        self.nothing = mixture.nothing()

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.samples)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each sample's first caption. Raises ValueError for a prompt that is not the number of a sample."""
        self.check(prompts)
        told = [self._told(prompt.strip()) for prompt in prompts]
        return {key: torch.cat([one[key] for one in told]) for key in self.nothing}

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that is not the number of a sample."""
        for prompt in (each.strip() for each in prompts):
            if not prompt.isdecimal() or int(prompt) >= len(self):
                raise ValueError(
                    f"prompt {prompt!r} is not the number of a stored caption, 0 to {len(self) - 1}, and no encoder "
                    "is at hand to read it as text"
                )

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """None: a number is read as it is, or refused."""
        return []

    def _told(self, prompt: str) -> dict[str, Tensor]:
        path, row = self.samples.place(int(prompt))
        return padded(self.mixture.reader(path).sample(row).captions[0], self.mixture.wanted.length)


def numbers(condition: Condition, count: int) -> list[str]:
    """So many prompts of a condition whose prompts are numbers, in turn: of classes, or of captions of the largest
    bucket, in which pictures along the way are drawn. Raises ValueError for one that reads text.
    """
    if not isinstance(condition, StoredCaptions | Labels):
        raise ValueError("no prompts; say what to draw: an encoded data set does not hold its captions as text")
    known = condition.samples.in_largest if isinstance(condition, StoredCaptions) else len(condition)
    return [str(i % known) for i in range(count)]


def largest(mixture: Mixture) -> MixedBucket:
    """The bucket of most samples: what pictures along the way are drawn in."""
    return max(mixture.buckets, key=lambda bucket: bucket.samples)


def _counts(mixture: Mixture, split: Split, bucket: str) -> list[int]:
    """A bucket's samples in each data set."""
    if split == "heldout":
        return [counts.get(bucket, 0) for counts in mixture.heldout_counts()]
    counts = {share.dataset: share.samples for share in mixture.shares[bucket]}
    return [counts.get(dataset, 0) for dataset in range(len(mixture.sources))]
