"""Checkpoints without a layout: whole, named, logical tensors (README.md has the picture)."""

from megadit.checkpoint.boxes import Box, flat_range_boxes
from megadit.checkpoint.store import LogicalTensor, Piece, latest, load, load_tensors, read_manifest, save

__all__ = [
    "Box",
    "LogicalTensor",
    "Piece",
    "flat_range_boxes",
    "latest",
    "load",
    "load_tensors",
    "read_manifest",
    "save",
]
