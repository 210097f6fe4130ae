"""The configuration of the data, readable before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]  # by GenEval's names
Shape = Literal["circle", "square", "triangle", "cross", "ring", "diamond"]


@dataclass(frozen=True)
class DataConfig:
    """The data set, the samples of one optimizer step over all ranks, and those of one forward pass on one rank."""

    kind: Literal["digits", "shapes", "arrays", "shards", "images"] = "digits"
    # arrays: the .npz file; shards: the folder of an encoded data set; images: a folder, tar or parquet file, which is
    # encoded at the start into the run's folder.
    path: str = ""
    resolution: int = 256  # images, shapes: pixels of a square's side, and so of the area of other shapes
    tasks: tuple[Task, ...] = ()  # shapes: those that take turns, often if named often; none: all six
    shapes: tuple[Shape, ...] = ()  # shapes: those that are drawn; none: all six
    # shards, in place of `path`: several folders, and how often each is drawn, in any unit.
    sets: dict[str, float] = field(default_factory=dict)
    heldout: int = 100  # shards: one sample in so many is held out; 0: none
    small_buckets: Literal["error", "drop"] = "error"  # shards: what becomes of a bucket that fills no batch
    verify: bool = False  # shards: read all and compare checksums before the first step
    # images: what encodes them; shards: what the latents must be of, and pictures are decoded with, if it is named.
    autoencoder: str = ""
    autoencoder_revision: str = ""
    threads: int = 4  # shards: that read, on each rank
    ahead: int = 4  # shards: steps that are read in advance
    global_batch: int = 256
    micro_batch: int = 0  # 0: as large as there are pipeline stages to fill, one microbatch each
