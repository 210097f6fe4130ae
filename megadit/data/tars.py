"""WebDataset tars: consecutive members whose names agree up to the first dot are one sample.

    0001.jpg  0001.json        a sample: .jpg, .jpeg, .png or .webp, with .txt, or .json, or both
    0002.png  0002.txt

Headers are read one after the other, from any sample on, and of contents only what is wanted. Where a header is
damaged, the next readable one is looked for, and the stretch between counts as one bad sample.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megadit.data.images import SUFFIXES
from megadit.data.quarantine import Bad, Unusable
from megadit.data.told import of_sidecars
from megadit.data.units import Contents, Counter, Raw, Read

BLOCK = tarfile.BLOCKSIZE


@dataclass
class _Group:
    """Members of one sample, by suffix: (offset, bytes). offset: of its first header."""

    key: str
    offset: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Damage:
    """What is wrong in the file at `offset`."""

    bad: Bad
    offset: int


class Tars:
    """Reads the samples of a tar. A place is the byte of a sample's first header."""

    def mark(self, path: Path) -> str:
        return f"{path.stat().st_size} bytes"

    def index(self, path: Path, unit: int) -> Contents:
        """Reads every header."""
        counter = Counter(unit)
        with path.open("rb") as file:
            for item in _samples(file, 0):
                key = item.key if isinstance(item, _Group) else None
                counter.add(item.offset, key)
        return counter.contents(self.mark(path))

    def read(self, path: Path, start: int, count: int, max_bytes: int) -> Iterator[Read]:
        with path.open("rb") as headers, path.open("rb", buffering=0) as contents:
            for item in islice(_samples(headers, start), count):
                if isinstance(item, _Damage):
                    yield item.bad
                    continue
                try:
                    yield _read(contents, item, max_bytes)
                except Unusable as bad:
                    yield bad.of(item.key)


def _read(file: BinaryIO, group: _Group, max_bytes: int) -> Raw:
    image = next((suffix for suffix in SUFFIXES if suffix in group.members), None)
    if image is None:
        raise Unusable("no image", f"its members: {', '.join(sorted(group.members))}")
    if group.members[image][1] > max_bytes:
        raise Unusable("decompression bomb", f"{group.members[image][1]} bytes")
    text, fields = (
        _content(file, *group.members[suffix]) if suffix in group.members else None for suffix in ("txt", "json")
    )
    return Raw(group.key, _content(file, *group.members[image]), of_sidecars(text, fields))


def _content(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = b""
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    return content


def _samples(file: BinaryIO, start: int) -> Iterator[_Group | _Damage]:
    group: _Group | None = None
    for item in _members(file, start):
        if isinstance(item, _Damage):
            if group is not None and item.bad.key != group.key:
                yield group
            group = None
            yield item
            continue
        key, suffix = _key_and_suffix(item.name)
        if group is not None and (key != group.key or suffix in group.members):
            yield group
            group = None
        group = group or _Group(key, item.offset)
        group.members[suffix] = item.offset_data, item.size
    if group is not None:
        yield group


def _members(file: BinaryIO, start: int) -> Iterator[tarfile.TarInfo | _Damage]:
    """Files from a header on, and what is damaged between them."""
    size = file.seek(0, 2)
    offset: int | None = start
    while offset is not None and offset < size:
        headers = _Headers(file, offset)
        for info in headers:
            if info.offset_data + info.size > size:
                key, _ = _key_and_suffix(info.name)
                yield _Damage(Bad(key, "truncated archive", f"it ends in the middle of {info.name}"), info.offset)
                return
            if _is_sample(info):
                yield info
        file.seek(headers.offset)
        block, after = file.read(BLOCK), file.read(BLOCK)
        if len(block) < BLOCK or (block.count(0) == BLOCK and len(after) < BLOCK):
            break
        marks_end = (block + after).count(0) == 2 * BLOCK  # two blocks of zeros do
        offset = _next_header(file, headers.offset + BLOCK)
        if not marks_end or offset is not None:
            detail = f"{'the mark of an end' if marks_end else 'no header'} at byte {headers.offset}"
            yield _Damage(Bad(f"@{headers.offset}", "bad tar member", detail), headers.offset)
        if offset is None:
            return
    yield _Damage(Bad(f"@{size}", "truncated archive", "it lacks the mark of its end"), size)


def _key_and_suffix(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and what it is there.

    >>> _key_and_suffix("./train/0001.seg.PNG")
    ('train/0001', 'seg.png')
    """
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}".lstrip("/"), suffix.lower()


def _is_sample(info: tarfile.TarInfo) -> bool:
    """A regular file, and not one of the hidden ones, which macOS adds."""
    return info.isreg() and not info.name.rpartition("/")[2].startswith(".")


class _Headers:
    """Members from an offset on, until there is no header that can be read; `offset` is then where."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self.file, self.offset = file, offset

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        try:
            self.file.seek(self.offset)
            tar = tarfile.TarFile(fileobj=self.file)
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would remember them all
                if info.size < 0 or tar.offset <= info.offset:
                    return  # damage, too: it would lead back to where it was
                yield info
                self.offset = tar.offset
        except (OSError, MemoryError):
            raise
        except Exception:  # damaged headers make tarfile raise whatever its arithmetic comes to
            return


def _next_header(file: BinaryIO, offset: int) -> int | None:
    """Where the next header is that can be read, at whole blocks from `offset` on."""
    while True:
        file.seek(offset)
        chunk = file.read(BLOCK << 11)
        if len(chunk) < BLOCK:
            return None
        at = chunk.find(b"ustar")
        while at >= 0:
            block = at - 257
            if block >= 0 and block % BLOCK == 0:
                try:
                    tarfile.TarInfo.frombuf(chunk[block : block + BLOCK], tarfile.ENCODING, "surrogateescape")
                    return offset + block
                except tarfile.TarError:
                    pass
            at = chunk.find(b"ustar", at + 1)
        offset += len(chunk) // BLOCK * BLOCK
