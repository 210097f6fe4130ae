"""Features and scores of whole sets of pictures, shared out over the ranks and brought together in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from megadit.evaluation.clip_score import ClipScore
from megadit.evaluation.features import Extractor
from megadit.evaluation.heldout_split import Share
from megadit.evaluation.images import open_rgb
from megadit.evaluation.painter import Painter
from megadit.runtime.agreement import brought_to_main, together
from megadit.runtime.launch import Process

CHUNK = 32  # pictures that are read at once

Numbered = tuple[Sequence[int], list[Image.Image]]  # places in the whole set, and their pictures


def of_files(paths: Sequence[Path], process: Process) -> Iterator[Numbered]:
    """This rank's share of a set of files."""
    own = range(process.rank, len(paths), process.world_size)
    bar = tqdm(own, desc="images", unit="image", dynamic_ncols=True, disable=not process.is_main)
    numbers = iter(bar)
    while chunk := list(islice(numbers, CHUNK)):
        yield chunk, [open_rgb(paths[i]) for i in chunk]


def of_heldout(share: Share, painter: Painter) -> Iterator[Numbered]:
    """This rank's share of the held-out images: of a run on latents, what its autoencoder makes of them."""
    sampler = painter.sampler
    bar = tqdm(
        share.batches(),
        total=share.count,
        desc="held-out images",
        unit="batch",
        dynamic_ncols=True,
        disable=sampler.grid.rank > 0,
    )
    for batch, weight_B in bar:
        kept = weight_B > 0
        if sampler.writes and kept.any():
            latents_BCHW = batch.latents_BCHW[kept].to(sampler.pipeline.device)
            yield batch.sample_ids_B[kept].tolist(), painter.pictures(latents_BCHW)


def of_drawn(painter: Painter, prompts: Sequence[str]) -> Iterator[Numbered]:
    """This rank's share of the pictures that are drawn of the prompts. Collective, as every turn is."""
    hidden = painter.sampler.grid.rank > 0
    with tqdm(total=len(prompts), desc="pictures", unit="picture", dynamic_ncols=True, disable=hidden) as bar:

        def drawn(pictures: range) -> None:
            bar.update(len(pictures))

        yield from painter.turns(prompts, drawn=drawn)


class Part(NamedTuple):
    """The features that one rank extracted, [n, width], and the places of their pictures in the whole set."""

    numbers: list[int]
    rows: np.ndarray


def extracted(pictures: Iterable[Numbered], extractor: Extractor) -> Part:
    """The features of this rank's share."""
    numbers: list[int] = []
    rows = [np.zeros((0, extractor.width), np.float32)]
    for indices, chunk in pictures:
        if chunk:
            numbers += indices
            rows.append(extractor.extract(chunk).numpy())
    return Part(numbers, np.concatenate(rows))


def assembled(own: Part) -> Tensor:
    """The features of the whole set, [N, width], in its order, on rank 0; none on the others. Collective."""
    parts = brought_to_main(own)
    numbers = [number for part in parts for number in part.numbers]
    rows = np.concatenate([part.rows for part in parts]) if parts else own.rows[:0]
    return torch.from_numpy(rows[np.argsort(numbers, kind="stable")] if parts else rows)


def file_features(paths: Sequence[Path], extractor: Extractor, process: Process) -> Tensor:
    """The features of a set of files, as `assembled`. Raises ValueError, on every rank, naming one that is no image."""
    with together():
        own = extracted(of_files(paths, process), extractor)
    return assembled(own)


def heldout_features(share: Share, painter: Painter, extractor: Extractor) -> Tensor:
    """The features of the held-out images, as `assembled`. Raises ValueError naming a shard that cannot be read."""
    with together():
        own = extracted(of_heldout(share, painter), extractor)
    return assembled(own)


def drawn_features(painter: Painter, prompts: Sequence[str], extractor: Extractor) -> Tensor:
    """The features of the pictures that are drawn of the prompts, as `assembled`. Raises ValueError as `shares`."""
    return assembled(extracted(of_drawn(painter, prompts), extractor))


def add_all(pictures: Iterable[Numbered], captions: Sequence[str], score: ClipScore) -> None:
    """Give a CLIP score this rank's share."""
    for indices, chunk in pictures:
        score.add(chunk, [captions[i] for i in indices])
