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
from megadit.data.stored import Numbered, StoredCaptions
from megadit.encoders.condition import Condition, Labels
from megadit.evaluation.defaults import BATCH
from megadit.runtime.seed import stream
from megadit.training.config import CONFIG_FILE, RunConfig, load_config
from megadit.training.encoded import open_mixture
from megadit.training.restore import Sampler


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
        mixture = _open_heldout(trained)
        totals = _totals(mixture)
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


def _open_heldout(trained: RunConfig) -> Mixture:
    """A run's encoded data sets, in the buckets that it trains on. Raises ValueError where nothing is held out."""
    mixture = open_mixture(replace(trained, data=replace(trained.data, verify=False)))
    if not sum(_totals(mixture)):
        raise ValueError(f"data.heldout={trained.data.heldout} holds nothing out; there is nothing to look at")
    return mixture


def _totals(mixture: Mixture) -> list[int]:
    """Held-out samples of each bucket."""
    counts = mixture.heldout_counts()
    return [sum(one.get(bucket.name, 0) for one in counts) for bucket in mixture.buckets]


def heldout_prompts(directory: Path, condition: Condition, count: int | None = None) -> list[str]:
    """What held-out samples of a run's data are told: captions, or numbers of classes or of stored captions.

    count: of so many samples, in turn where there are fewer; None: of each. Of an encoded data set they are spread over
    all of its buckets. Raises ValueError where nothing is held out, or encoders read the text of an encoded data set.
    """
    config = load_config(directory / CONFIG_FILE)
    if config.data.kind != "shards":
        dataset = open_dataset(config.data, "heldout", config.model.conditioning)
        indices = [i % len(dataset) for i in range(count or len(dataset))]
        return [dataset.caption(i, stream(config.run.seed, "caption", 0, i)) for i in indices]
    if not isinstance(condition, StoredCaptions | Labels):
        raise ValueError("an encoded data set does not hold its captions as text; say what to draw with --prompts")
    mixture = _open_heldout(config)
    samples = Numbered(mixture)
    total = len(samples)
    count = count or total
    chosen = [i * total // count if count < total else i % total for i in range(count)]
    if isinstance(condition, StoredCaptions):
        return [str(i) for i in chosen]
    return [str(mixture.reader(path).label(row)) for path, row in map(samples.place, chosen)]
