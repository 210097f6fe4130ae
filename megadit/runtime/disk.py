"""Files that are whole whenever they are there, also after a kill or a power failure."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and put it on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put renames and new files on disk; without it a power failure, though not a kill, could undo their order."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` this content at once: whoever reads it sees the old one or the new one, whole."""
    new = path.with_name(path.name + ".new")
    write_synced(new, content)
    os.replace(new, path)
    sync_folder(path.parent)
