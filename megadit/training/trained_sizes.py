"""Which sizes of images a run was trained on."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from megadit.data.manifest import read_manifest
from megadit.training.config import RunConfig

logger = logging.getLogger("megadit")


def trained_sizes(config: RunConfig) -> list[tuple[int, int]]:
    """(height, width) of the latent images that the run's data has, sorted. Raises ValueError where it is not there."""
    data = config.data
    if data.kind != "shards":
        return [(config.model.image_size, config.model.image_size)]
    manifests = [read_manifest(Path(folder).expanduser()) for folder in data.sets or [data.path]]
    return sorted({bucket.latent[1:] for manifest in manifests for bucket in manifest.buckets})


def untrained_size(config: RunConfig, size: tuple[int, int] | None, cell: int = 1) -> str | None:
    """What to know of drawing latent images of `size` (None: the model's square); None where the run was trained on it.

    cell: pixels along a latent cell's side, in which sizes are told.
    """
    square = (config.model.image_size, config.model.image_size)
    asked = size or square
    try:
        known = trained_sizes(config)
    except ValueError as error:
        if asked == square:
            return None
        return f"pictures of {told(asked, cell)}: the sizes that the model was trained on are not known ({error})"
    return not_among(known, asked, cell)


def warn_of_size(config: RunConfig, size: tuple[int, int] | None, cell: int = 1) -> None:
    """In the log, of a size that the run was not trained on; arguments as of `untrained_size`."""
    if warning := untrained_size(config, size, cell):
        logger.warning("%s", warning)


def not_among(known: Collection[tuple[int, int]], size: tuple[int, int], cell: int = 1) -> str | None:
    """What to know of drawing latent images of `size` with a model that was trained on those of `known`."""
    if size in known:
        return None
    sizes = ", ".join(told(each, cell) for each in known)
    return f"the model was not trained on pictures of {told(size, cell)}, but of {sizes}; expect worse ones"


def told(latent: tuple[int, int], cell: int) -> str:
    """A latent's size in pixels.

    >>> told((8, 12), cell=8)
    '64x96'
    """
    return f"{latent[0] * cell}x{latent[1] * cell}"
