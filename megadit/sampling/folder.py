"""A folder of pictures that may be drawn in several goes: a PNG for each, and what they are of.

00000.png, 00001.png, ...
prompts.jsonl    a line for each picture that there is or will be: index, prompt, seed, file
settings.json    what else the pictures depend on
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megadit.runtime.disk import replace_file
from megadit.sampling.picture import read_picture, save_picture

PROMPTS_FILE, SETTINGS_FILE = "prompts.jsonl", "settings.json"
PICTURE = re.compile(r"\d{5,}\.png")
AGAIN = "choose another folder, or draw all of it again with --overwrite"


def name_of(index: int) -> str:
    """The file of a picture.

    >>> name_of(7), name_of(123456)
    ('00007.png', '123456.png')
    """
    return f"{index:05d}.png"


def check_writable(path: Path) -> None:
    """Raises ValueError unless a file or folder could be created at `path`; creates nothing."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    folder = nearest if path != nearest or path.is_dir() else path.parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: no permission to write in {folder}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError within becomes a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of `prompts`, whose noise is that of `seed` and of their index; settings: JSON, by name."""

    path: Path
    prompts: Sequence[str]
    seed: int
    settings: Mapping[str, Any]

    def begin(self, overwrite: bool = False) -> set[int]:
        """Create the folder, or go on in it: the indices of the pictures that are there.

        Everything that is there must be of the same prompts, seed and settings. `overwrite`: what is there is removed,
        pictures of other prompts too. Raises ValueError naming what differs, or a file that cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self._clear()
            else:
                self._check_same()
            replace_file(self.path / SETTINGS_FILE, json.dumps(dict(self.settings), indent=1).encode() + b"\n")
            replace_file(self.path / PROMPTS_FILE, b"".join(self._lines()))
            return {index for index in range(len(self.prompts)) if (self.path / name_of(index)).exists()}

    def write(self, indices: Iterable[int], images_BCHW: Tensor) -> None:
        """A PNG of each image. Raises ValueError naming a file that cannot be written."""
        for index, image_CHW in zip(indices, images_BCHW, strict=True):
            path = self.path / name_of(index)
            with writing(path):
                save_picture(image_CHW, path)

    def read(self) -> list[Tensor]:
        """The bytes of every picture, [C, H, W]. Raises ValueError naming one that is not there."""
        return [read_picture(self.path / name_of(index)) for index in range(len(self.prompts))]

    def _lines(self) -> list[bytes]:
        entries = (
            {"index": index, "prompt": prompt, "seed": self.seed, "file": name_of(index)}
            for index, prompt in enumerate(self.prompts)
        )
        return [json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries]

    def _clear(self) -> None:
        """Remove the pictures that are to be drawn, and those that an earlier drawing listed."""
        names = {name_of(index) for index in range(len(self.prompts))}
        names |= {name for name in _listed(self.path) if PICTURE.fullmatch(name)}
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _check_same(self) -> None:
        manifest = self.path / PROMPTS_FILE
        if not manifest.exists():
            if any(PICTURE.fullmatch(entry.name) for entry in self.path.iterdir()):
                raise ValueError(f"{self.path} holds pictures, but no {PROMPTS_FILE} that says of what; {AGAIN}")
            return
        before, now = _json_lines(manifest), _json_lines_of(self._lines())
        for number, (old, new) in enumerate(zip(before, now, strict=False), 1):
            for key in new:
                if old.get(key) != new[key]:
                    difference = f"{key} {old.get(key)!r}, which is {new[key]!r} now"
                    raise ValueError(f"{manifest}: line {number} has the {difference}; {AGAIN}")
        if len(before) != len(now):
            raise ValueError(f"{manifest} lists {len(before)} pictures, which are {len(now)} now; {AGAIN}")
        path = self.path / SETTINGS_FILE
        was = _json_lines_of([path.read_bytes()])[0] if path.exists() else {}
        for key, value in self.settings.items():
            if was.get(key) != value:
                raise ValueError(f"{path}: {key} was {was.get(key)!r} and is {value!r} now; {AGAIN}")


def _json_lines_of(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """JSON objects; an empty one in place of what is none."""

    def parsed(line: bytes) -> dict[str, Any]:
        try:
            content = json.loads(line)
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    return [parsed(line) for line in lines]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return _json_lines_of(path.read_bytes().splitlines())


def _listed(folder: Path) -> set[str]:
    """The files that the manifest of an earlier drawing names."""
    path = folder / PROMPTS_FILE
    return {str(entry.get("file", "")) for entry in _json_lines(path)} if path.exists() else set()
