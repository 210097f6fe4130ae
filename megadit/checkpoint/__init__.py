"""Checkpoints without a layout: whole, named, logical tensors (README.md has the picture)."""

from megadit.checkpoint.boxes import Box, flat_range_boxes
from megadit.checkpoint.folder import go_back, newest_before
from megadit.checkpoint.saver import Saver
from megadit.checkpoint.store import (
    DTYPES,
    LogicalTensor,
    Piece,
    SaveError,
    latest,
    load,
    load_tensors,
    read_manifest,
    save,
)

__all__ = [
    "DTYPES",
    "Box",
    "LogicalTensor",
    "Piece",
    "SaveError",
    "Saver",
    "flat_range_boxes",
    "go_back",
    "latest",
    "load",
    "load_tensors",
    "newest_before",
    "read_manifest",
    "save",
]
