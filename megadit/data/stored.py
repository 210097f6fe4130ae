"""Captions that are stored in an encoded data set stand in for prompts, where no text encoder is at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megadit.data.mixture import MixedBucket, Mixture, Split, padded
from megadit.data.order import within
from megadit.encoders.condition import Condition, Labels


class StoredCaptions:
    """A `Condition` whose prompts are numbers of samples: what a run draws along the way, without an encoder.

    They count, from 0, the held-out samples of the mixture's largest bucket, data set after data set; where none are
    held out, those to train on.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.nothing = mixture.nothing()
        self._bucket = largest(mixture)
        self._split, self._counts = shown(mixture, self._bucket.name)

    def __len__(self) -> int:
        """The number of prompts."""
        return sum(self._counts)

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
        (dataset,), index_N = within(np.cumsum(self._counts), np.array([int(prompt)]))
        ((path, row),) = self.mixture.locate(self._split, int(dataset), self._bucket.name, index_N)
        return padded(self.mixture.reader(path).sample(row).captions[0], self.mixture.wanted.length)


def numbers(condition: Condition, count: int) -> list[str]:
    """So many prompts of a condition whose prompts are numbers, in turn. Raises ValueError for one that reads text."""
    if not isinstance(condition, StoredCaptions | Labels):
        raise ValueError("no prompts; say what to draw: an encoded data set does not hold its captions as text")
    return [str(i % len(condition)) for i in range(count)]


def largest(mixture: Mixture) -> MixedBucket:
    """The bucket of most samples: what pictures along the way are drawn in."""
    return max(mixture.buckets, key=lambda bucket: bucket.samples)


def shown(mixture: Mixture, bucket: str) -> tuple[Split, list[int]]:
    """(the split that prompts are taken of, its samples of a bucket in each data set)."""
    heldout = [counts.get(bucket, 0) for counts in mixture.heldout_counts()]
    if any(heldout):
        return "heldout", heldout
    counts = {share.dataset: share.samples for share in mixture.shares[bucket]}
    return "train", [counts.get(dataset, 0) for dataset in range(len(mixture.sources))]
