"""Parquet files with the bytes of images in one column, as plain bytes or as {bytes, path}, and captions in others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.data.quarantine import Bad, Unusable
from megadit.data.told import of_fields
from megadit.data.units import Contents, Raw, Read

ROWS = 64  # that are in memory at a time


@dataclass(frozen=True)
class Columns:
    """What the columns are called. Of caption (a text or a list) and captions one suffices; label is for classes."""

    image: str = "image"
    caption: str = "caption"
    captions: str = "captions"
    weights: str = "weights"
    label: str = "label"


class Tables:
    """Reads the rows of a parquet file. A place is the number of a row; its key, too."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def mark(self, path: Path) -> str:
        return f"{path.stat().st_size} bytes"

    def index(self, path: Path, unit: int) -> Contents:
        """From the footer alone. A file that is no parquet is one bad sample. Raises ValueError without the columns."""
        file = _open(path)
        if file is None:
            return Contents(self.mark(path), 1, (0,))
        with file:
            self._names(path, file)
            samples = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        return Contents(self.mark(path), samples, tuple(range(0, samples, unit)))

    def read(self, path: Path, start: int, count: int, max_bytes: int) -> Iterator[Read]:
        file = _open(path)
        if file is None:
            yield Bad("@0", "unreadable file", "no parquet")
            return
        with file:
            names, begin = self._names(path, file), 0
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                first, last = max(begin, start), min(end, start + count)
                if first < last:
                    yield from self._rows(file, group, begin, range(first, last), names, max_bytes)
                begin = end

    def _rows(self, file: Any, group: int, begin: int, rows: range, names: list[str], max_bytes: int) -> Iterator[Read]:
        """Rows of one row group, whose first row is `begin`."""
        import pyarrow

        row, fault = begin, "it has fewer rows than the file says"
        try:
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=names):
                if row + len(batch) <= rows.start:
                    row += len(batch)
                    continue
                for number in range(len(batch)):
                    if row in rows:
                        yield self._sample(str(row), batch.slice(number, 1), max_bytes)
                    row += 1
                if row >= rows.stop:
                    return
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not what is on it
            fault = str(error)
        for bad in range(max(row, rows.start), rows.stop):
            yield Bad(str(bad), "unreadable file", f"row group {group}: {fault}".splitlines()[0])

    def _sample(self, key: str, row: Any, max_bytes: int) -> Read:
        """Of a batch of one row."""
        columns = self.columns
        try:
            (fields,) = row.to_pylist()
        except UnicodeDecodeError as error:
            return Bad(key, "unreadable caption", str(error))
        image = fields[columns.image]
        image = image.get("bytes") if isinstance(image, dict) else image
        names = ("caption", "captions", "weights", "label")
        try:
            if not isinstance(image, bytes):
                raise Unusable("no image", "null" if image is None else f"{type(image).__name__}, not bytes")
            if len(image) > max_bytes:
                raise Unusable("decompression bomb", f"{len(image)} bytes")
            return Raw(key, image, of_fields({name: fields.get(getattr(columns, name)) for name in names}))
        except Unusable as bad:
            return bad.of(key)

    def _names(self, path: Path, file: Any) -> list[str]:
        """The columns to read."""
        there, columns = set(file.schema_arrow.names), self.columns
        if columns.image not in there:
            raise ValueError(
                f"{path} has no column {columns.image!r} for images, but {', '.join(sorted(there))}; name it with "
                "--column image=NAME"
            )
        wanted = (columns.image, columns.caption, columns.captions, columns.weights, columns.label)
        return [name for name in wanted if name in there]


def _open(path: Path) -> Any:
    """The file, or None if it is no parquet. Raises ValueError without pyarrow, OSError when it is not there."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    path.stat()
    try:
        # Read as it is used: by default, whole row groups would be in memory.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        _ = file.schema_arrow.names  # which may be no text, where the footer is damaged
        return file
    except (pyarrow.ArrowException, UnicodeDecodeError):
        return None
    except OSError as error:
        if error.errno is not None:
            raise
        return None  # a footer that is damaged
