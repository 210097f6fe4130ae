"""Batches as a pure function of (seed, step): resuming is one number, and every layout reads the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megadit.data.arrays import Arrays
from megadit.data.batch import Batch
from megadit.data.config import DataConfig
from megadit.data.digits import Digits
from megadit.data.shapes.dataset import Shapes
from megadit.data.shapes.scene import Split
from megadit.encoders.condition import Condition, Conditioning
from megadit.runtime.seed import stream


class Dataset(Protocol):
    """What the loader needs of a data set's split.

    is_endless: there is a sample for every index, so none comes twice, and the split has no length.
    """

    is_endless: bool

    def __len__(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""

    def images(self, ids_B: Tensor) -> Tensor:
        """float32 [B, C, H, W]."""

    def caption(self, index: int, generator: torch.Generator) -> str:
        """A caption of sample `index`, or the number of its class; `generator` gives what is random about it."""

    def corpus(self) -> list[str]:
        """Every caption that can be shown, or every class that occurs."""

    def prompts(self, count: int) -> list[str]:
        """Captions, or numbers of classes, to sample pictures from."""


def open_dataset(config: DataConfig, split: Split, conditioning: Conditioning = "text") -> Dataset:
    """The "train" or "heldout" split of what is held in memory, or drawn.

    Raises ValueError naming a file that cannot be read, or the key at fault.
    """
    assert config.kind in ("digits", "shapes", "arrays"), "those are read by a loader of their own"
    if config.kind == "shapes":
        if conditioning != "text":
            raise ValueError("data.kind=shapes has captions and no classes; use model.conditioning=text")
        return Shapes(split, config.resolution, config.tasks, config.shapes)
    if config.kind == "arrays":
        return Arrays(split, config.path, conditioning)
    return Digits(split, conditioning)


def dataset_indices(seed: int, step: int, dataset_size: int, global_batch: int) -> Tensor:
    """The indices of one step's global batch, [global_batch]: each epoch is a permutation of its own.

    Steps count from 1. A batch may reach over the end of an epoch.
    """
    position = torch.arange((step - 1) * global_batch, step * global_batch)
    epoch, index = position // dataset_size, position % dataset_size
    ids = torch.empty_like(position)
    for number in epoch.unique().tolist():
        order = torch.randperm(dataset_size, generator=stream(seed, "epoch", number))
        ids[epoch == number] = order[index[epoch == number]]
    return ids


class Loader:
    """One data-parallel rank's share of each step: consecutive samples of the global batch."""

    def __init__(
        self, dataset: Dataset, condition: Condition, seed: int, global_batch: int, rank: int, size: int
    ) -> None:
        """`rank` and `size` are those of the data-parallel group."""
        self.dataset, self.condition, self.seed = dataset, condition, seed
        self.global_batch, self.rank, self.size = global_batch, rank, size

    def batch(self, step: int) -> Batch:
        """This rank's batch of a training step (from 1)."""
        sample_ids = torch.arange((step - 1) * self.global_batch, step * self.global_batch)
        indices = sample_ids
        if not self.dataset.is_endless:
            indices = dataset_indices(self.seed, step, len(self.dataset), self.global_batch)
        return self._read(sample_ids.chunk(self.size)[self.rank], indices.chunk(self.size)[self.rank], step)

    def heldout(self) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's share of the whole split, in batches of the training shape, each with a weight per sample, [B].

        The last batch is filled up with samples of weight zero. Captions do not change from call to call.
        """
        total = len(self.dataset)
        for begin in range(0, total, self.global_batch):
            position = torch.arange(begin, begin + self.global_batch).chunk(self.size)[self.rank]
            yield self._read(position % total, position % total, 0), (position < total).float()

    def _read(self, sample_ids_B: Tensor, indices_B: Tensor, step: int) -> Batch:
        captions = [
            self.dataset.caption(index, stream(self.seed, "caption", step, sample))
            for sample, index in zip(sample_ids_B.tolist(), indices_B.tolist(), strict=True)
        ]
        return Batch(sample_ids_B, self.dataset.images(indices_B), self.condition.encode(captions))
