"""Images in a folder, with captions beside each, or all in one captions.jsonl.

photo.jpg  photo.txt                 a caption
other.png  other.json                {"captions": ["a cat", "an animal"], "weights": [3, 1], "label": 2}

captions.jsonl                       a line an image, and no others: {"file": "photo.jpg", "caption": "a dog"}
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megadit.data.images import SUFFIXES
from megadit.data.quarantine import Reason, Unusable
from megadit.data.told import json_object, of_fields, of_sidecars
from megadit.data.units import OF_THE_FILE, Contents, Counter, Raw, Read, at_fault, of_file


def images_in(path: Path) -> list[str]:
    """Names of the image files of a folder, sorted. Raises OSError."""
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if is_image(entry.name) and _is_file(entry)]
    return sorted(names)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether there is one; true of what cannot be told, such as a link to itself: reading it says what is wrong."""
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        return True


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return not name.startswith(".") and Path(name).suffix[1:].lower() in SUFFIXES


class Folders:
    """Reads the images that lie in one folder, not those in folders below. A place is the number of a sample."""

    def __init__(self) -> None:
        self._listed: tuple[Path, list[str]] | None = None

    def mark(self, path: Path) -> str:
        names = "\0".join(self._names(path)).encode(errors="surrogateescape")
        return f"names {hashlib.sha256(names).hexdigest()[:16]}"

    def index(self, path: Path, unit: int) -> Contents:
        counter = Counter(unit)
        for number, name in enumerate(self._names(path)):
            counter.add(number, Path(name).stem)
        return counter.contents(self.mark(path))

    def read(self, path: Path, start: int, count: int, max_bytes: int) -> Iterator[Read]:
        for name in self._names(path)[start : start + count]:
            stem = Path(name).stem
            try:
                text = _sidecar(path / f"{stem}.txt", "unreadable caption")
                told = of_sidecars(text, _sidecar(path / f"{stem}.json", "unreadable json"))
                yield Raw(stem, of_file(path / name, max_bytes), told)
            except Unusable as bad:
                yield bad.of(stem)

    def _names(self, path: Path) -> list[str]:
        """Listed once for the units of a folder, which follow one another."""
        if self._listed is None or self._listed[0] != path:
            self._listed = path, images_in(path)
        return self._listed[1]


def _sidecar(path: Path, reason: Reason) -> bytes | None:
    """What lies beside an image, None where nothing does. Raises Unusable when it cannot be read."""
    with at_fault(path, reason):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):  # an image's name may just fit
                return None
            raise


class CaptionLines:
    """Reads the images that a captions.jsonl names, beside which they lie. A place is the byte of a line."""

    def mark(self, path: Path) -> str:
        return f"{path.stat().st_size} bytes"

    def index(self, path: Path, unit: int) -> Contents:
        counter = Counter(unit)
        for start, line in _lines(path, 0):
            try:
                key = _file_of(json_object(line))
            except Unusable:
                key = None
            counter.add(start, key)
        return counter.contents(self.mark(path))

    def read(self, path: Path, start: int, count: int, max_bytes: int) -> Iterator[Read]:
        for place, line in islice(_lines(path, start), count):
            key = f"@{place}"
            try:
                fields = json_object(line)
                key = _file_of(fields)
                told = of_fields(fields)
                yield Raw(key, of_file(path.parent / key, max_bytes), told)
            except Unusable as bad:
                yield bad.of(key)


def _lines(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """(where it begins, content) of each line that is not blank."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if line.strip():
                yield start, line
            start += len(line)


def _file_of(fields: dict) -> str:
    name = fields.get("file")
    if not isinstance(name, str) or not name or "\0" in name:
        raise Unusable("unreadable json", 'it has no "file", the name of an image')
    return name
