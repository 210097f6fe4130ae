"""Checkpoints and folders of safetensors written by one process, a part of a tensor at a time.

Where they go, a folder appears under its name only when it is complete: it is written beside it, as "name.partial".
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadit.checkpoint import folder as disk
from megadit.checkpoint.folder import Progress
from megadit.checkpoint.source import CONFIG_FILE
from megadit.runtime.disk import sync_folder, write_synced
from megadit.runtime.tensor_file import HashedTensorFileWriter, Spec, TensorFileWriter

CHECKPOINT_FILE_BYTES = 1 << 32
_PARTIAL = ".partial"


class Outgoing(NamedTuple):
    """A tensor on its way: `parts()` yields it in pieces that are consecutive along dimension 0."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterator[Tensor]]

    @property
    def spec(self) -> Spec:
        return Spec(self.shape, self.dtype)


class Slot(NamedTuple):
    """Rows [begin, end) of a tensor, by its place among them all, in one file."""

    tensor: int
    begin: int
    end: int


def plan_files(specs: Sequence[Spec], limit: int, split: bool) -> list[list[Slot]]:
    """Which file gets what: in the given order, as much as fits into `limit` bytes.

    A larger tensor has files of its own: with `split` as many as it takes, each of whole rows, else one.

    >>> specs = [Spec((2,), torch.uint8), Spec((5, 2), torch.uint8), Spec((3,), torch.uint8)]
    >>> [[tuple(slot) for slot in file] for file in plan_files(specs, limit=4, split=True)]
    [[(0, 0, 2)], [(1, 0, 2)], [(1, 2, 4)], [(1, 4, 5)], [(2, 0, 3)]]
    """
    files: list[list[Slot]] = []
    room = 0  # in the last file
    for index, spec in enumerate(specs):
        rows, num_bytes = _rows(spec.shape), spec.num_bytes
        if num_bytes > limit:
            step = max(1, limit * rows // num_bytes) if split else rows
            files += [[Slot(index, begin, min(begin + step, rows))] for begin in range(0, rows, step)]
            room = 0
            continue
        if not files or num_bytes > room:
            files.append([])
            room = limit
        files[-1].append(Slot(index, 0, rows))
        room -= num_bytes
    return files


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


class _Feed:
    """The rows of a tensor, as many at a time as a file has room for."""

    def __init__(self, tensor: Outgoing) -> None:
        self.tensor, self.parts = tensor, tensor.parts()
        self.rest: Tensor | None = None

    def take(self, count: int) -> Iterator[Tensor]:
        while count:
            part = self.rest if self.rest is not None else next(self.parts)
            rows = part if self.tensor.shape else part.reshape(1)
            assert rows.dtype == self.tensor.dtype and rows.shape[1:] == self.tensor.shape[1:], self.tensor.name
            self.rest = rows[count:] if len(rows) > count else None
            rows = rows[:count]
            count -= len(rows)
            yield rows

    def is_empty(self) -> bool:
        return self.rest is None and not any(part.numel() for part in self.parts)


def write_checkpoint(
    run_folder: Path,
    step: int,
    tensors: Sequence[Outgoing],
    metadata: Mapping[str, object],
    progress: Progress,
    file_bytes: int = CHECKPOINT_FILE_BYTES,
) -> Path:
    """Write the checkpoint of `step` into a run's folder and make it the latest. Returns its path.

    `metadata` is JSON: the resolved config and the version. A failure leaves the older checkpoints as they were.
    """
    folder = run_folder / "checkpoints"
    plan = plan_files([tensor.spec for tensor in tensors], file_bytes, split=True)
    table: dict[str, dict[str, Any]] = {
        tensor.name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "boxes": [],
        }
        for tensor in tensors
    }
    disk.begin(folder, step)
    files, feeds = [], [_Feed(tensor) for tensor in tensors]
    for number, slots in enumerate(plan):
        path = disk.partial_path(folder, step) / f"part_{number:05d}.safetensors"
        boxes: dict[str, tuple[Slot, Spec]] = {}
        for slot in slots:
            tensor = tensors[slot.tensor]
            if not tensor.spec.numel:
                continue  # a tensor without elements has no boxes
            sizes = (slot.end - slot.begin, *tensor.shape[1:]) if tensor.shape else ()
            offsets = (slot.begin,) + (0,) * (len(tensor.shape) - 1) if tensor.shape else ()
            boxes[f"{tensor.name}@{','.join(map(str, offsets))}"] = slot, Spec(sizes, tensor.dtype)
            table[tensor.name]["boxes"].append([list(offsets), list(sizes), path.name])
        with HashedTensorFileWriter(path, {key: spec for key, (_, spec) in boxes.items()}) as file:
            for key in file.order:
                _pour(feeds[boxes[key][0].tensor], boxes[key][0], file, progress)
        files.append(asdict(disk.SavedFile(path.name, file.size, file.digest.hexdigest())))
    manifest = {
        "format": disk.FORMAT,
        "step": step,
        "metadata": dict(metadata),
        "files": files,
        "tensors": table,
    }
    disk.commit(folder, step, manifest, keep=0)
    return disk.step_path(folder, step)


def _pour(feed: _Feed, slot: Slot, file: TensorFileWriter, progress: Progress) -> None:
    for rows in feed.take(slot.end - slot.begin):
        file.write(rows)
        progress(rows.numel() * rows.element_size())
    if slot.end == _rows(feed.tensor.shape):
        assert feed.is_empty(), f"{feed.tensor.name} brought more rows than it has"


def write_folder(
    folder: Path,
    tensors: Sequence[Outgoing],
    config: Mapping[str, Any],
    progress: Progress,
    max_shard_bytes: int = 5_000_000_000,
    stem: str = "model",
) -> None:
    """Fill `folder` with config.json and the tensors in one safetensors file, or in several and an index.

    A tensor larger than `max_shard_bytes` has a file of its own.
    """
    folder.mkdir(exist_ok=True)
    plan = plan_files([tensor.spec for tensor in tensors], max_shard_bytes, split=False)
    weight_map, total = {}, 0
    for number, slots in enumerate(plan or [[]], start=1):
        single = len(plan) <= 1
        name = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(plan):05d}.safetensors"
        inside = {tensors[slot.tensor].name: slot for slot in slots}
        specs = {name: tensors[slot.tensor].spec for name, slot in inside.items()}
        # transformers refuses a file that does not say which framework its tensors are of.
        with TensorFileWriter(folder / name, specs, metadata={"format": "pt"}) as file:
            for key in file.order:
                _pour(_Feed(tensors[inside[key].tensor]), inside[key], file, progress)
        weight_map.update(dict.fromkeys(inside, name))
        total += sum(spec.num_bytes for spec in specs.values())
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_synced(folder / f"{stem}.safetensors.index.json", _pretty(index))
    write_synced(folder / CONFIG_FILE, _pretty(config))
    sync_folder(folder)


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


@contextmanager
def appearing(folder: Path, may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A path beside `folder` to make a folder at, or files in; it gets its name when the block ends.

    After an error, or Ctrl-C, nothing stays. A kill leaves "name.partial", which the next call removes. `may_replace`
    says whether a folder that is there and not empty may go; by default none may.

    Raises ValueError if `folder` may not be written, or is being written by another process.
    """
    folder = folder.absolute()
    if folder.is_symlink():
        folder = folder.resolve()
    partial = folder.with_name(folder.name + _PARTIAL)
    _check_destination(folder, may_replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(partial)
    try:
        yield partial
        sync_folder(partial)
        _check_destination(folder, may_replace)
        if folder.exists() and any(folder.iterdir()):
            replaced = folder.with_name(folder.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
            partial.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _check_destination(folder: Path, may_replace: Callable[[Path], bool] | None) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder that is not there yet")
    if any(folder.iterdir()) and not (may_replace and may_replace(folder)):
        raise ValueError(f"{folder} is there already, and not empty; name another folder, or remove it")


def _claim(partial: Path) -> int:
    """Make an empty folder at `partial`, in place of what a killed process left there; the descriptor holds it."""
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"{partial} is being written by another process; wait for it, or name another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    for stale in partial.iterdir():
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink()
    return lock
