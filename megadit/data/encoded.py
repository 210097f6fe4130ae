"""Batches of encoded data sets: a pure function of (seed, step), read ahead by threads.

A rank reads its own samples and nothing else. What a step needs is known from its number alone, so the next steps are
read while this one computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from megadit.data.batch import Batch
from megadit.data.mixture import Mixture, Place, Split
from megadit.data.order import Order, within
from megadit.data.shards import ShardReader
from megadit.runtime.seed import stream
from megadit.runtime.tensor_file import bytes_of


class EncodedLoader:
    """One data-parallel rank's share of each step: consecutive samples of the global batch, all in one bucket."""

    def __init__(self, mixture: Mixture, seed: int, rank: int, size: int, threads: int = 4, ahead: int = 4) -> None:
        """`rank` and `size` are those of the data-parallel group. `ahead`: steps that `threads` read in advance."""
        global_batch = mixture.wanted.global_batch
        assert global_batch % size == 0, f"{global_batch} samples over {size} ranks"
        self.mixture, self.seed, self.rank, self.size = mixture, seed, rank, size
        self.order = Order(seed, global_batch, mixture.shares)
        self._share = range(rank * global_batch // size, (rank + 1) * global_batch // size)
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(threads, "loader")  # threads start when they are needed
        self._coming: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """This rank's batch of a training step (from 1). Raises ValueError naming a shard that cannot be read."""
        wanted = range(step, step + 1 + self._ahead)
        for other in self._coming.keys() - set(wanted):  # after a jump
            self._coming.pop(other).cancel()
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = self._pool.submit(self._read_step, number)
        return self._coming.pop(step).result()

    def heldout(self) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's share of the held-out samples, in batches of the training's shapes, each of one bucket and with a
        weight per sample, [B].

        A bucket's last batch is filled up with samples of weight zero. Captions do not change from call to call.
        """
        counts, first = self.mixture.heldout_counts(), 0
        for bucket in self.mixture.buckets:
            ends = np.cumsum([one.get(bucket.name, 0) for one in counts])
            total = int(ends[-1])
            for begin in range(0, total, self.mixture.wanted.global_batch):
                position_B = begin + np.arange(self._share.start, self._share.stop)
                place_B = position_B % total
                dataset_B, index_B = within(ends, place_B)
                places = self._locate("heldout", bucket.name, dataset_B, index_B)
                batch = self._read(torch.from_numpy(first + place_B), bucket.latent, places, 0)
                yield batch, torch.from_numpy(position_B < total).float()
            first += total

    def close(self) -> None:
        """End the threads; what they read is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()

    def _read_step(self, step: int) -> Batch:
        found = self.order.places(step, self._share.start, self._share.stop)
        first = (step - 1) * self.order.global_batch
        sample_ids_B = torch.arange(first + self._share.start, first + self._share.stop)
        (latent,) = (bucket.latent for bucket in self.mixture.buckets if bucket.name == found.bucket)
        places = self._locate("train", found.bucket, found.dataset_B, found.index_B)
        return self._read(sample_ids_B, latent, places, step)

    def _locate(self, split: Split, bucket: str, dataset_B: np.ndarray, index_B: np.ndarray) -> list[Place]:
        """Where samples are, in their order."""
        places: dict[int, Place] = {}
        for dataset in np.unique(dataset_B).tolist():
            (chosen,) = np.nonzero(dataset_B == dataset)
            found = self.mixture.locate(split, dataset, bucket, index_B[chosen])
            places.update(zip(chosen.tolist(), found, strict=True))
        return [places[i] for i in range(len(places))]

    def _read(self, sample_ids_B: Tensor, latent: tuple[int, int, int], places: list[Place], step: int) -> Batch:
        """Read samples into new memory; their captions are drawn for this step."""
        latents_BCHW = empty(len(places), *latent, dtype=self.mixture.dtype)
        told: _Labels | _Captions = (
            _Labels() if self.mixture.wanted.classes else _Captions(self.mixture, len(places), self.seed, step)
        )
        row_of = rows_of(latents_BCHW)
        for i, (path, place) in enumerate(places):
            reader = self.mixture.reader(path)
            reader.read_latents(place, row_of(i))
            told.read(reader, place, int(sample_ids_B[i]))
        return Batch(sample_ids_B, latents_BCHW.float(), told.condition())


class _Labels:
    """The classes of a batch, read sample by sample."""

    def __init__(self) -> None:
        self._labels: list[int] = []

    def read(self, reader: ShardReader, place: int, sample_id: int) -> None:
        self._labels.append(reader.label(place))

    def condition(self) -> dict[str, Tensor]:
        return {"labels_B": torch.tensor(self._labels)}


class _Captions:
    """The captions of a batch, read sample by sample: states, padded with zeros to the length that the network reads,
    mask, and pooled vectors if there are any.
    """

    def __init__(self, mixture: Mixture, samples: int, seed: int, step: int) -> None:
        self._length, self._seed, self._step = mixture.wanted.length, seed, step
        self._states_BLC = empty(samples, self._length, mixture.text_channels, dtype=mixture.dtype)
        self._pooled_BP = torch.empty(samples, mixture.pooled_channels, dtype=mixture.dtype)
        self._states_of, self._pooled_of = rows_of(self._states_BLC), rows_of(self._pooled_BP)
        self._counts: list[int] = []

    def read(self, reader: ShardReader, place: int, sample_id: int) -> None:
        i, captions = len(self._counts), reader.captions(place)
        chosen = captions[0]
        if len(captions) > 1:
            chosen = captions[drawn(reader.weights(place), stream(self._seed, "caption", self._step, sample_id))]
        self._counts.append(reader.read_states(chosen, self._states_of(i)))
        if self._counts[i] < self._length:
            self._states_BLC[i, self._counts[i] :] = 0
        if self._pooled_BP.shape[1]:
            reader.read_pooled(chosen, self._pooled_of(i))

    def condition(self) -> dict[str, Tensor]:
        mask_BL = torch.arange(self._length) < torch.tensor(self._counts)[:, None]
        told = {"text_states_BLC": self._states_BLC, "text_mask_BL": mask_BL}
        return told | {"text_pooled_BP": self._pooled_BP} if self._pooled_BP.shape[1] else told


def drawn(weights: np.ndarray, generator: torch.Generator) -> int:
    """An index, drawn by weight."""
    ends = np.cumsum(weights, dtype=np.float64)
    point = float(torch.rand((), dtype=torch.float64, generator=generator)) * ends[-1]
    return min(int(np.searchsorted(ends, point, side="right")), len(ends) - 1)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory for a batch. numpy's, which asks for huge pages: touching those for the first time costs a third."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape)


def rows_of(tensor_BX: Tensor) -> Callable[[int], memoryview]:
    """The memory of one row of a contiguous tensor."""
    whole = bytes_of(tensor_BX)
    size = len(whole) // len(tensor_BX)
    return lambda row: whole[row * size : (row + 1) * size]
