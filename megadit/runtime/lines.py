"""A file of JSON lines that survives kills and full disks: metrics.jsonl, events.jsonl."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("megadit")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, but for those that are no JSON: a kill, or a power failure, cut them short."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def _in_json(value: Any) -> Any:
    """The same, with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _in_json(item) for key, item in value.items()}
    return [_in_json(item) for item in value] if isinstance(value, list | tuple) else value


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """One line at the end, in one write, whoever else has the file open. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, json.dumps(_in_json(line), allow_nan=False).encode() + b"\n")
    finally:
        os.close(handle)


class LineFile:
    """Appends lines, each whole or not at all; what a full disk does not take waits for the next one."""

    def __init__(self, path: Path, keep: Callable[[Mapping[str, Any]], bool] | None = None) -> None:
        """Of the lines that are there, those stay that `keep` wants (default: all). Raises OSError."""
        kept = read_lines(path) if path.exists() else []
        replacement = path.with_name(path.name + ".partial")
        replacement.write_text("".join(json.dumps(line) + "\n" for line in kept if keep is None or keep(line)))
        os.replace(replacement, path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""  # what found no room

    def append(self, line: Mapping[str, Any]) -> None:
        """One line; floats are printed with all their digits, and null where JSON has no word for them."""
        self._write(json.dumps(_in_json(line), allow_nan=False).encode() + b"\n")

    def _write(self, content: bytes) -> None:
        waited = bool(self._unwritten)
        self._unwritten += content
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                logger.error("%s: %s; its lines wait for room", self._file.name, error)

    def close(self) -> None:
        """A last attempt at what waits, then close."""
        self._write(b"")
        self._file.close()
