"""Samples before they are encoded, and units: fixed ranges of samples of one file, however many ranks there are."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megadit.data.quarantine import Bad, Reason, Unusable
from megadit.data.told import Told


@dataclass(frozen=True)
class Raw:
    """A sample as it lies in its source: the bytes of an image file, and what is told of it."""

    key: str
    image: bytes
    told: Told


# Faults of one file, which come again whenever it is read. Others are the disk's, and may pass.
OF_THE_FILE = frozenset(
    (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
)

Read = Raw | Bad  # what a source gives in the place of each sample


@dataclass(frozen=True)
class Contents:
    """What is in a file. mark: changes when the file does, its bytes or a digest of its names. samples: their number,
    the bad ones too. starts: where each unit begins, in the reader's own terms. repeats: numbers of samples whose key
    came before.
    """

    mark: str
    samples: int
    starts: tuple[int, ...]
    repeats: tuple[int, ...] = ()


class Reader(Protocol):
    """Reads the samples of one kind of file, in an order that does not change."""

    def mark(self, path: Path) -> str:
        """What changes when the file does. Raises OSError."""

    def index(self, path: Path, unit: int) -> Contents:
        """Count, and find where each `unit` samples begin. Raises OSError, and ValueError for a user's mistake."""

    def read(self, path: Path, start: int, count: int, max_bytes: int) -> Iterator[Read]:
        """`count` samples from a place of `Contents.starts` on; of images with more bytes, nothing. Raises OSError."""


class Counter:
    """Makes `Contents` of samples that come one after the other."""

    def __init__(self, unit: int) -> None:
        self.unit, self.samples = unit, 0
        self.starts: list[int] = []
        self.repeats: list[int] = []
        # Hashes, since keys would take several times the memory; of ten million, two agree in one of 400,000 cases.
        self._seen: set[int] = set()

    def add(self, start: int, key: str | None) -> None:
        """The next sample: where it begins, and its key, None for what is no sample but damage."""
        if self.samples % self.unit == 0:
            self.starts.append(start)
        if key is not None:
            if hash(key) in self._seen:
                self.repeats.append(self.samples)
            self._seen.add(hash(key))
        self.samples += 1

    def contents(self, mark: str) -> Contents:
        return Contents(mark, self.samples, tuple(self.starts), tuple(self.repeats))


def of_file(path: Path, max_bytes: int) -> bytes:
    """The content of an image's file. Raises Unusable when there is none, or it is too large, OSError for the disk."""
    with at_fault(path, "no image"):
        if path.stat().st_size > max_bytes:
            raise Unusable("decompression bomb", f"{path.stat().st_size} bytes")
        return path.read_bytes()


@contextmanager
def at_fault(path: Path, reason: Reason) -> Iterator[None]:
    """A block that reads one sample's file, whose own faults are raised as Unusable, for this reason."""
    try:
        yield
    except UnicodeEncodeError as error:  # JSON can spell names that no file can have
        raise Unusable(reason, f"{path.name}: no name of a file") from error
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        raise Unusable(reason, f"{path.name}: {error.strerror}") from error
