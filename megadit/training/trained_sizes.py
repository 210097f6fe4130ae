"""Which sizes of images a run was trained on."""

from __future__ import annotations

from pathlib import Path

from megadit.data.manifest import read_manifest
from megadit.training.config import RunConfig


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

    def told(latent: tuple[int, int]) -> str:
        return f"{latent[0] * cell}x{latent[1] * cell}"

    try:
        known = trained_sizes(config)
    except ValueError as error:
        if asked == square:
            return None
        return f"pictures of {told(asked)}: the sizes that the model was trained on are not known ({error})"
    if asked in known:
        return None
    sizes = ", ".join(map(told, known))
    return f"the model was not trained on pictures of {told(asked)}, but of {sizes}; expect worse ones"
