"""Whether every byte of a source is as it was saved, as far as that can be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megadit.checkpoint import folder as disk
from megadit.checkpoint.source import (
    CONFIG_FILE,
    MANIFEST_FILE,
    CheckpointSource,
    Manifest,
    box_fault,
    find_checkpoint,
    is_folder_source,
    open_source,
    read_checked_manifest,
    read_folder_headers,
    read_json,
)
from megadit.checkpoint.stream import Progress
from megadit.conversion.weights import Bar
from megadit.runtime.tensor_file import Entry, read_header


@dataclass
class Findings:
    """What was looked at, what is wrong with it, and what is only worth knowing."""

    path: Path
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_sources(paths: Sequence[Path], bar: Bar) -> None:
    """Read every byte of the checkpoints among `paths`, so that no damage is copied under a new sha256.

    Raises ValueError naming a damaged file.
    """
    found = [source for source in map(open_source, paths) if isinstance(source, CheckpointSource)]
    progress = bar(sum(file.size for source in found for file in source.manifest.files))
    for source in found:
        source.check_bytes(progress=progress)


def verify(path: Path, bar: Bar) -> Findings:
    """Look at every file of a checkpoint, or at the headers of an export or a folder of diffusers.

    Raises ValueError for what is no source at all.
    """
    if is_folder_source(path):
        return verify_folder(path)
    found = find_checkpoint(path)
    findings = verify_checkpoint(found, bar)
    findings.notes += leftovers(found.absolute().parent)
    return findings


def verify_folder(path: Path) -> Findings:
    """Nobody has noted the bytes of these files: that headers, lengths and index agree is all that can be known."""
    findings = Findings(path, notes=leftovers(path.absolute().parent, path.absolute().name))
    try:
        read_json(path / CONFIG_FILE)
        headers = read_folder_headers(path)
    except ValueError as error:
        findings.faults.append(str(error))
        return findings
    findings.faults += headers.faults
    unknown = {file.name for file in path.glob(f"{headers.stem}*.safetensors")} - set(headers.file_of.values())
    findings.notes += [f"{path / name} is not in the index" for name in sorted(unknown - headers.files.keys())]
    return findings


def verify_checkpoint(path: Path, bar: Bar) -> Findings:
    """Sizes and sha256 of every file, and that each box of the manifest lies in its file."""
    findings = Findings(path)
    try:
        manifest = read_checked_manifest(path)
    except ValueError as error:
        findings.faults.append(str(error))
        return findings
    progress = bar(sum(file.size for file in manifest.files))
    headers: dict[str, dict[str, Entry]] = {}
    for file in manifest.files:
        try:
            headers[file.name] = checked_file(path / file.name, file.size, file.sha256, progress)
        except ValueError as error:
            findings.faults.append(str(error))
    findings.faults += box_faults(path, manifest, headers)
    listed = {file.name for file in manifest.files} | {MANIFEST_FILE}
    findings.notes += [f"{file} is not in the manifest" for file in sorted(path.iterdir()) if file.name not in listed]
    return findings


def checked_file(path: Path, size: int, sha256: str, progress: Progress) -> dict[str, Entry]:
    """The header of a file that has this size and sha256. Raises ValueError naming the file."""
    try:
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not the {size} that were saved")
        disk.check_sha256(path, sha256, progress)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return read_header(path)


def box_faults(path: Path, manifest: Manifest, headers: dict[str, dict[str, Entry]]) -> list[str]:
    """Boxes that sound files do not hold as the manifest says, and what they hold beside them."""
    faults = []
    used: dict[str, set[str]] = {file: set() for file in headers}
    for name, boxes in manifest.boxes.items():
        for box in boxes:
            if box.file in headers:
                fault = box_fault(headers[box.file], name, box, manifest.tensors[name].dtype)
                faults += [f"{path / box.file}: {fault}"] if fault else []
                used[box.file].add(box.key(name))
    for file, header in headers.items():
        faults += [f"{path / file}: {key} is not in the manifest" for key in sorted(header.keys() - used[file])]
    return faults


def leftovers(folder: Path, name: str = "*") -> list[str]:
    """What interrupted writers left beside complete folders."""
    found = [path for ending in ("partial", "replaced") for path in folder.glob(f"{name}.{ending}") if path.is_dir()]
    return [f"{path} was left by a writer that did not finish; the next one removes it" for path in sorted(found)]
