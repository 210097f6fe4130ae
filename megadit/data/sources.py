"""Where images and captions come from: tars, folders, parquet files; and the units that they are encoded in.

`find` names the files, `Readers.index` counts their samples, `units` cuts these into fixed ranges, and `Readers.read`
gives the samples of one. None of them depends on the number of ranks, and no file is ever in memory as a whole.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megadit.data.folders import CaptionLines, Folders, is_image
from megadit.data.quarantine import Bad
from megadit.data.tables import Columns, Tables
from megadit.data.tars import Tars
from megadit.data.units import Contents, Raw, Read, Reader

Kind = Literal["tar", "parquet", "folder", "jsonl"]
CAPTIONS_FILE = "captions.jsonl"
_KINDS: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet", ".jsonl": "jsonl"}


@dataclass(frozen=True)
class SourceFile:
    """A file, or a folder of images. name: its path below what all sources have in common; samples are named by it."""

    name: str
    path: Path
    kind: Kind


@dataclass(frozen=True)
class Unit:
    """`count` samples of a file, the first of which is its sample number `begin` and lies at `start`.

    mark: of the file, when it was looked through.
    """

    number: int
    file: SourceFile
    mark: str
    begin: int
    start: int
    count: int
    repeats: frozenset[int]  # numbers, in the file, of those whose key came before


def find(sources: Sequence[str | Path]) -> list[SourceFile]:
    """The files of all sources, in order. A folder stands for what is in it and below: its captions.jsonl, or else its
    tars, parquet files and images.

    Raises ValueError naming a source that is not there, of no known kind, empty, or there twice.
    """
    paths = [Path(source).expanduser().absolute() for source in sources]
    found: list[tuple[Path, Kind]] = []
    for path in paths:
        below = list(_below(path))
        if not below:
            raise ValueError(f"{path} has no images, {CAPTIONS_FILE}, .tar or .parquet in it")
        found += below
    if not found:
        raise ValueError("no sources: name tars, parquet files or folders")
    twice = [path for path, count in Counter(path for path, _ in found).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is among the sources twice")
    root = os.path.commonpath([path.parent for path in paths])
    return [SourceFile(_text(os.path.relpath(path, root)), path, kind) for path, kind in found]


def _text(name: str) -> str:
    """A file's name as text that can be written as UTF-8."""
    return name.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _below(path: Path) -> Iterator[tuple[Path, Kind]]:
    try:
        if not path.is_dir():
            kind = _KINDS.get(path.suffix)
            if kind is None:
                raise ValueError(
                    f"{path} is no folder, and no .tar, .parquet or .jsonl; unpack a tar that is compressed"
                )
            if not path.is_file():
                raise ValueError(f"{path}: there is no such file")
            yield path, kind
            return
        for folder, folders, files in os.walk(path, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if CAPTIONS_FILE in files:
                folders.clear()  # it names what lies below, too
                yield Path(folder, CAPTIONS_FILE), "jsonl"
                continue
            if any(is_image(name) for name in files):
                yield Path(folder), "folder"
            for name in sorted(files):
                if name.endswith((".tar", ".parquet")) and not name.startswith("."):
                    yield Path(folder, name), _KINDS[Path(name).suffix]
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise error


def units(files: Sequence[SourceFile], contents: Sequence[Contents], size: int) -> list[Unit]:
    """Ranges of up to `size` samples of one file each, in order."""
    found: list[Unit] = []
    for file, content in zip(files, contents, strict=True):
        for k, start in enumerate(content.starts):
            begin, end = k * size, min((k + 1) * size, content.samples)
            repeats = frozenset(number for number in content.repeats if begin <= number < end)
            found.append(Unit(len(found), file, content.mark, begin, start, end - begin, repeats))
    return found


class Readers:
    """Reads files of every kind."""

    def __init__(self, columns: Columns, max_bytes: int) -> None:
        """`max_bytes`: of an image's file; a larger one is not read."""
        self.max_bytes = max_bytes
        self._readers: dict[Kind, Reader] = {
            "tar": Tars(),
            "parquet": Tables(columns),
            "folder": Folders(),
            "jsonl": CaptionLines(),
        }

    def mark(self, file: SourceFile) -> str:
        """What changes when the file does. Raises ValueError when it cannot be read."""
        try:
            return self._readers[file.kind].mark(file.path)
        except OSError as error:
            raise ValueError(f"{file.path} cannot be read: {error.strerror}") from error

    def index(self, file: SourceFile, unit: int) -> Contents:
        """What is in the file. Raises ValueError when it cannot be read."""
        try:
            return self._readers[file.kind].index(file.path, unit)
        except OSError as error:
            raise ValueError(f"{file.path} cannot be read: {error.strerror}") from error

    def read(self, unit: Unit) -> Iterator[Read]:
        """Each sample of a unit, good or bad. Raises OSError when the disk fails, or the file is another one by now."""
        count, reader = 0, self._readers[unit.file.kind]
        if reader.mark(unit.file.path) != unit.mark:
            raise OSError(f"{unit.file.path} has changed since the encoding began")
        for sample in reader.read(unit.file.path, unit.start, unit.count, self.max_bytes):
            key = _text(f"{unit.file.name}/{sample.key}")
            if unit.begin + count in unit.repeats:
                yield Bad(key, "duplicate key", "a sample of this key came before it")
            elif isinstance(sample, Raw):
                yield Raw(key, sample.image, sample.told)
            else:
                yield Bad(key, sample.reason, _text(sample.detail))
            count += 1
        if count != unit.count:
            raise OSError(f"{unit.file.path} has changed since the encoding began")
