"""Checkpoints on disk: which folders are complete, which is the latest, and how one comes and goes.

    latest                       the name of the checkpoint to resume from
    step_00000010/               complete: it has this name only after everything in it, manifest.json last, is on disk
    step_00000020.partial/       being written, or being removed; the next save deletes it
    step_00000010.replaced/      the older save of a step that is being saved again, until the new one has its name

Only renames change what a reader sees, so a kill at any moment leaves the old state or the new one. Functions that
change the disk are called by one rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megadit.runtime.disk import sync_folder, write_synced

FORMAT = 1
MANIFEST_FILE = "manifest.json"
_LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})(?:\.replaced)?")

Progress = Callable[[int], object]  # is told of so many more bytes


def ignore(num_bytes: int) -> None:
    """The progress that nobody looks at."""


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint, as the manifest lists it."""

    name: str
    size: int
    sha256: str


def step_path(folder: Path, step: int) -> Path:
    """Where the complete checkpoint of `step` lies."""
    return folder / f"step_{step:08d}"


def partial_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies while it is written."""
    return folder / f"step_{step:08d}.partial"


def read_manifest(path: Path) -> dict:
    """The manifest of the checkpoint at `path`: format, step, metadata, files and tensors.

    Raises ValueError where there is none, or one of another format.
    """
    try:
        manifest = json.loads((Path(path) / MANIFEST_FILE).read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}/{MANIFEST_FILE} is not of format {FORMAT}, the one that this version reads")
    return manifest


def latest(folder: Path) -> Path | None:
    """The checkpoint to resume from: the one that `folder/latest` names, else the complete one of the highest step.

    None if there is no complete checkpoint. To resume from an older one, write its name into `folder/latest`.
    """
    complete = _complete(Path(folder))
    pointer = Path(folder) / _LATEST
    named = _STEP.fullmatch(pointer.read_text(errors="replace").strip()) if pointer.is_file() else None
    if named and int(named[1]) in complete:
        return complete[int(named[1])]
    return complete[max(complete)] if complete else None


def check_file(path: Path, size: int, sha256: str | None, progress: Progress = ignore) -> None:
    """Raises ValueError, naming the file, if it is missing, of another size or, unless None, of another sha256."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not the {size} that were saved")
    if sha256 is not None:
        check_sha256(path, sha256, progress)


def check_sha256(path: Path, sha256: str, progress: Progress = ignore) -> None:
    """Read all of a file. Raises ValueError naming it if its bytes are not those that were saved."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            progress(len(block))
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its sha256 is not the one that was saved")


def begin(folder: Path, step: int) -> None:
    """Clear away what killed saves left behind and make the folder to write `step` into."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    partial_path(folder, step).mkdir()


def clear(folder: Path) -> None:
    """Remove what saves left behind that were killed or failed, so that its room is free again."""
    (folder / f"{_LATEST}.new").unlink(missing_ok=True)
    for stale in sorted(folder.glob("step_*.partial")):
        shutil.rmtree(stale, ignore_errors=True)
    for replaced in sorted(folder.glob("step_*.replaced")):
        if replaced.with_suffix("").exists():
            _discard(replaced)
        else:
            replaced.rename(replaced.with_suffix(""))


def commit(folder: Path, step: int, manifest: dict, keep: int, keep_every: int = 0) -> None:
    """Turn the finished partial folder of `step` into the latest checkpoint.

    Of the others leave `keep` - 1, if > 0, and, if `keep_every` > 0, those whose step is a multiple of it.
    """
    partial, final = partial_path(folder, step), step_path(folder, step)
    replaced = final.with_suffix(".replaced")
    write_synced(partial / MANIFEST_FILE, json.dumps(manifest).encode())
    sync_folder(partial)
    # All that needs room on the disk comes before the first rename: a full disk leaves the old state.
    write_synced(folder / f"{_LATEST}.new", f"{final.name}\n".encode())
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(folder)
    os.replace(folder / f"{_LATEST}.new", folder / _LATEST)
    sync_folder(folder)
    if replaced.exists():
        _discard(replaced)
    if keep > 0:
        # Later steps first: they are of a course that was abandoned when the run went back.
        others = sorted(_complete(folder).keys() - {step}, key=lambda other: (other < step, other))
        for other in others[: max(0, len(others) - keep + 1)]:
            if not (keep_every and other % keep_every == 0):
                _discard(step_path(folder, other))


def newest_before(folder: Path, step: int) -> Path | None:
    """The complete checkpoint of the last step before `step`, if there is one."""
    found = _complete(folder)
    earlier = [other for other in found if other < step]
    return found[max(earlier)] if earlier else None


def go_back(folder: Path, step: int) -> None:
    """Make the complete checkpoint of `step` the latest one, and remove all later ones: their course is abandoned."""
    write_synced(folder / f"{_LATEST}.new", f"{step_path(folder, step).name}\n".encode())
    os.replace(folder / f"{_LATEST}.new", folder / _LATEST)
    sync_folder(folder)
    for other, path in _complete(folder).items():
        if other > step:
            _discard(path)


def _complete(folder: Path) -> dict[int, Path]:
    """The complete checkpoint of each step; where a kill left no other, the one that was being replaced."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("step_*"), reverse=True):  # "step_1.replaced" before "step_1", which wins
        name = _STEP.fullmatch(path.name)
        if name and (path / MANIFEST_FILE).is_file():
            found[int(name[1])] = path
    return found


def _discard(path: Path) -> None:
    # Renamed first: a kill halfway through the removal must not leave something that looks complete. What cannot be
    # removed now (NFS, while another process has a file open) is no reason to fail a save; the next one tries again.
    with contextlib.suppress(OSError):
        shutil.rmtree(path.rename(path.with_name(path.name + ".partial")), ignore_errors=True)
