"""The held-out samples of a run's data set, read by the ranks of any layout in the same groups."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megadit.data.batch import Batch
from megadit.data.encoded import EncodedLoader
from megadit.data.loader import Loader, open_dataset
from megadit.data.mixture import Mixture
from megadit.data.stored import numbers
from megadit.encoders.condition import Condition
from megadit.runtime.seed import stream
from megadit.training.config import CONFIG_FILE, RunConfig, load_config
from megadit.training.encoded import open_mixture
from megadit.training.restore import Sampler

BATCH = 16  # samples of a call on one rank, about


@dataclass(frozen=True)
class Share:
    """What a data-parallel rank reads of the split: `count` batches, of `total` samples that all ranks read together.

    A batch is whole routing groups of consecutive samples. The last is filled up with samples of weight zero, so that
    every rank has as many batches.
    """

    loader: Loader | EncodedLoader
    total: int
    count: int

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch, and the weight of each of its samples, [B]."""
        return self.loader.heldout()


def open_share(directory: Path, sampler: Sampler, batch: int = BATCH) -> Share:
    """This rank's share; `batch`: samples of a batch, rounded up to whole groups. Raises ValueError naming the data set
    that cannot be read, or has nothing held out.
    """
    trained, ranks = load_config(directory / CONFIG_FILE), sampler.grid["dp"]
    per_rank = -(-batch // sampler.group) * sampler.group
    if trained.data.kind == "shards":
        mixture = open_mixture(trained)
        totals = _totals(mixture)
        if not sum(totals):
            raise ValueError(f"data.heldout={trained.data.heldout} holds nothing out; there is nothing to look at")
        alike = copy.copy(mixture)  # in the buckets that were trained on, but in batches of this layout
        alike.wanted = replace(mixture.wanted, global_batch=per_rank * ranks.size)
        loader: Loader | EncodedLoader = EncodedLoader(
            alike, trained.run.seed, ranks.rank, ranks.size, trained.data.threads
        )
    else:
        dataset = open_dataset(trained.data, "heldout", trained.model.conditioning)
        totals = [len(dataset)]
        whole = per_rank * ranks.size
        loader = Loader(dataset, sampler.condition, trained.run.seed, whole, ranks.rank, ranks.size)
    return Share(loader, sum(totals), sum(math.ceil(total / (per_rank * ranks.size)) for total in totals))


def _totals(mixture: Mixture) -> list[int]:
    """Held-out samples of each bucket."""
    counts = mixture.heldout_counts()
    return [sum(one.get(bucket.name, 0) for one in counts) for bucket in mixture.buckets]


def heldout_prompts(config: RunConfig, condition: Condition, count: int) -> list[str]:
    """The captions or classes of the first `count` held-out samples, in turn where there are fewer.

    Of an encoded data set numbers, of classes or of stored captions; raises ValueError where encoders read its text.
    """
    if config.data.kind != "shards":
        dataset = open_dataset(config.data, "heldout", config.model.conditioning)
        indices = [i % len(dataset) for i in range(count)]
        return [dataset.caption(i, stream(config.run.seed, "caption", 0, i)) for i in indices]
    return numbers(condition, count)
