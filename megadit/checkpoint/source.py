"""What a checkpoint or a folder of safetensors holds, read a box at a time by one process.

Only what is asked for is held, so that a conversion needs the memory of a tensor and not of a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megadit.checkpoint import folder as disk
from megadit.checkpoint.folder import MANIFEST_FILE, Progress
from megadit.runtime.tensor_file import DTYPES, Entry, Spec, are_sizes, read_box, read_header

__all__ = ["CheckpointSource", "FolderSource", "Source", "Spec", "find_checkpoint", "open_source"]

CONFIG_FILE = "config.json"
STEMS = ("model", "diffusion_pytorch_model")  # of the weights' files: ours and transformers', diffusers'


class Source(Protocol):
    """Named tensors that can be read in parts."""

    path: Path
    tensors: dict[str, Spec]

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The box of tensor `name` at `offsets` of `sizes`, by default all of it: contiguous, on the CPU.

        Raises ValueError, naming the tensor or the file, when it is not there or cannot be read.
        """
        ...


class StoredBox(NamedTuple):
    """A box of a tensor and the file of the checkpoint that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str

    def key(self, name: str) -> str:
        """What the box of tensor `name` is called in its file."""
        return f"{name}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    config: dict[str, Any]
    files: list[disk.SavedFile]
    tensors: dict[str, Spec]
    boxes: dict[str, list[StoredBox]]


def read_checked_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises ValueError naming it when it is damaged."""
    where = path / MANIFEST_FILE
    try:
        raw = disk.read_manifest(path)
        files = [disk.SavedFile(entry["name"], entry["size"], entry["sha256"]) for entry in raw["files"]]
        tensors, boxes = {}, {}
        for name, entry in raw["tensors"].items():
            if str(entry["dtype"]) not in DTYPES:
                raise ValueError(f"{where}: tensor {name} is of dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
            if not are_sizes(entry["shape"]):
                raise ValueError(f"{where}: tensor {name} has the shape {entry['shape']}")
            tensors[name] = Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            boxes[name] = [StoredBox(tuple(offsets), tuple(sizes), file) for offsets, sizes, file in entry["boxes"]]
        manifest = Manifest(int(raw["step"]), dict(raw["metadata"].get("config") or {}), files, tensors, boxes)
        faults = manifest_faults(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if str(path) in str(error):  # it says what is wrong
            raise
        raise ValueError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    if faults:
        raise ValueError(f"{where} is damaged: {'; '.join(faults)}")
    return manifest


def manifest_faults(manifest: Manifest) -> list[str]:
    """Files that lie elsewhere or are not listed, and tensors that their boxes do not tile."""
    listed = {file.name for file in manifest.files}
    faults = [f"file {name} lies outside its folder" for name in listed if Path(name).name != name]
    for name, boxes in manifest.boxes.items():
        unlisted = {box.file for box in boxes} - listed
        faults += [f"tensor {name} lies in {file}, which is not listed" for file in sorted(unlisted)]
        if fault := tiling_fault(manifest.tensors[name].shape, boxes):
            faults.append(f"tensor {name}: {fault}")
    return faults


class CheckpointSource:
    """A checkpoint of ours: tensors in boxes, in any layout."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, naming the file, unless the manifest is sound and every file has its size."""
        self.path = path
        self.manifest = read_checked_manifest(path)
        self.step, self.config = self.manifest.step, self.manifest.config
        self.tensors, self.boxes = self.manifest.tensors, self.manifest.boxes
        for file in self.manifest.files:
            disk.check_file(path / file.name, file.size, None)
        self._headers: dict[str, dict[str, Entry]] = {}

    def check_bytes(self, rank: int = 0, size: int = 1, progress: Progress = disk.ignore) -> None:
        """Check the sha256 of one in `size` files. Raises ValueError naming one that is damaged."""
        for file in self.manifest.files[rank::size]:
            disk.check_file(self.path / file.name, file.size, file.sha256, progress)

    def parameters(self, kind: str) -> dict[str, Spec]:
        """The tensors of a kind ("weight", "master", "ema", "exp_avg", "exp_avg_sq") under their parameters' names."""
        prefix = f"{kind}."
        return {name.removeprefix(prefix): spec for name, spec in self.tensors.items() if name.startswith(prefix)}

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        spec, begin, extent = _wanted(self, name, offsets, sizes)
        out = torch.empty(extent, dtype=spec.dtype)
        for box in self.boxes[name]:
            # The part of the box that is wanted, in the tensor's coordinates.
            low = [max(a, b) for a, b in zip(begin, box.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, extent, box.offsets, box.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            target = out
            for dim, (a, b) in enumerate(zip(low, high, strict=True)):
                target = target.narrow(dim, a - begin[dim], b - a)
            inside = [a - b for a, b in zip(low, box.offsets, strict=True)]
            read_box(self.path / box.file, self.entry(name, box), inside, target)
        return out

    def entry(self, name: str, box: StoredBox) -> Entry:
        """Where a box lies in its file. Raises ValueError when the file does not hold it, or holds another."""
        path = self.path / box.file
        if box.file not in self._headers:
            self._headers[box.file] = read_header(path)
        if fault := box_fault(self._headers[box.file], name, box, self.tensors[name].dtype):
            raise ValueError(f"{path}: {fault}")
        return self._headers[box.file][box.key(name)]


def box_fault(header: Mapping[str, Entry], name: str, box: StoredBox, dtype: torch.dtype) -> str | None:
    """Why a file's header does not hold this box of tensor `name`; None when it does."""
    wanted, found = Spec(box.sizes, dtype), header.get(box.key(name))
    if found is None:
        return f"{box.key(name)} is missing"
    return None if found.spec == wanted else f"{box.key(name)} is {found.spec}, the manifest says {wanted}"


def tiling_fault(shape: Sequence[int], boxes: Iterable[StoredBox]) -> str | None:
    """Why the boxes are no tiling of a tensor of `shape`; None when they are.

    >>> tiling_fault((4, 2), [StoredBox((0, 0), (3, 2), "a"), StoredBox((2, 0), (1, 2), "b")])
    'the boxes at (0, 0) and (2, 0) overlap'
    """
    covered = 0
    active: list[StoredBox] = []
    for box in sorted(boxes):
        if not (
            len(box.offsets) == len(box.sizes) == len(shape)
            and all(type(n) is int for n in (*box.offsets, *box.sizes))
            and all(min(o, n) >= 0 and o + n <= s for o, n, s in zip(box.offsets, box.sizes, shape, strict=True))
        ):
            return f"the box at {box.offsets} of sizes {box.sizes} is outside the shape {tuple(shape)}"
        # Sorted by where they begin, so that along dimension 0 only boxes that reach this far can overlap it.
        active = [other for other in active if other.offsets[0] + other.sizes[0] > box.offsets[0]] if shape else active
        for other in active:
            if all(
                max(a, b) < min(a + n, b + m)
                for a, n, b, m in zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True)
            ):
                return f"the boxes at {other.offsets} and {box.offsets} overlap"
        active.append(box)
        covered += math.prod(box.sizes)
    if covered != math.prod(shape):
        return f"its boxes hold {covered} of its {math.prod(shape)} elements"
    return None


@dataclass(frozen=True)
class FolderHeaders:
    """Which file of a folder has which tensors, and where the files and the index disagree, or are damaged."""

    stem: str  # of the files' names
    files: dict[str, dict[str, Entry]]
    file_of: dict[str, str]
    faults: list[str]


def read_folder_headers(path: Path) -> FolderHeaders:
    """Raises ValueError where there are no weights, or the index cannot be read."""
    index, stem = _find_weights(path)
    single = f"{stem}.safetensors"
    file_of = None if index is None else _read_index(index)
    files: dict[str, dict[str, Entry]] = {}
    faults = []
    for file in sorted(set(file_of.values())) if file_of is not None else [single]:
        try:
            files[file] = read_header(path / file)
        except ValueError as error:
            faults.append(str(error))
    if file_of is None:
        file_of = dict.fromkeys(files.get(single, {}), single)
    for file, header in files.items():
        mapped = {name for name, of in file_of.items() if of == file}
        faults += [f"{path / file} lacks {name}" for name in sorted(mapped - header.keys())]
        faults += [f"{path / file} has {name}, which the index does not" for name in sorted(header.keys() - mapped)]
    return FolderHeaders(stem, files, file_of, faults)


class FolderSource:
    """A folder with config.json and safetensors files: an export of ours, or a model of diffusers."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, naming every file at fault, unless the index and the headers of all files agree."""
        self.path = path
        self.config = read_json(path / CONFIG_FILE)
        headers = read_folder_headers(path)
        if headers.faults:
            raise ValueError("; ".join(headers.faults))
        self.files, self.file_of = headers.files, headers.file_of
        self.tensors = {name: self.files[file][name].spec for name, file in self.file_of.items()}

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        spec, begin, extent = _wanted(self, name, offsets, sizes)
        out = torch.empty(extent, dtype=spec.dtype)
        file = self.file_of[name]
        read_box(self.path / file, self.files[file][name], begin, out)
        return out


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the latest one of a run's folder or of its folder of checkpoints.

    Raises ValueError saying what is missing.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    _check_is_folder(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = disk.latest(folder)
    if found is None:
        raise ValueError(
            f"{path} is no checkpoint (no {MANIFEST_FILE}) and no run (no checkpoints/step_*/{MANIFEST_FILE})"
        )
    return found


def locate(path: Path) -> Path:
    """The folder that `open_source` would open now: of a run, which goes on, its latest checkpoint of this moment.

    Raises ValueError saying what is missing.
    """
    return path if is_folder_source(path) else find_checkpoint(path)


def open_source(path: Path) -> CheckpointSource | FolderSource:
    """A checkpoint, the latest checkpoint of a run, an export or a folder of diffusers.

    Raises ValueError, naming the file or saying what is missing, for anything else and for what is damaged.
    """
    if is_folder_source(path):
        return FolderSource(path)
    _check_is_folder(path)
    if (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is a whole pipeline of diffusers; name the folder of its network, {path / 'transformer'}"
        )
    try:
        return CheckpointSource(find_checkpoint(path))
    except ValueError as error:
        if (path / MANIFEST_FILE).exists() or disk.latest(path / "checkpoints") or disk.latest(path):
            raise
        raise ValueError(f"{error}, and no folder of safetensors (no {CONFIG_FILE})") from error


def is_folder_source(path: Path) -> bool:
    """Whether a path means a folder of safetensors, and not a checkpoint."""
    return (path / CONFIG_FILE).is_file() and not (path / MANIFEST_FILE).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def _check_is_folder(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name the folder of a run, a checkpoint, an export or a diffusers model")


def _find_weights(path: Path) -> tuple[Path | None, str]:
    """The index, if the weights are in several files, and the stem of their names."""
    found = [
        (stem, ending)
        for stem in STEMS
        for ending in ("safetensors", "safetensors.index.json")
        if (path / f"{stem}.{ending}").is_file()
    ]
    if len(found) > 1:
        names = " and ".join(f"{stem}.{ending}" for stem, ending in found)
        raise ValueError(f"{path} has both {names}; move away what is not meant")
    if not found:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f"; {pickled[0]} is pickled, and so could run code: save it as safetensors" if pickled else ""
        wanted = " or ".join(f"{stem}.safetensors" for stem in STEMS)
        raise ValueError(f"{path} has a {CONFIG_FILE}, but no {wanted}, nor their index{why}")
    ((stem, ending),) = found
    return (path / f"{stem}.{ending}" if ending.endswith("json") else None), stem


def _read_index(path: Path) -> dict[str, str]:
    """Which file has which tensor."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise ValueError(f"{path} is damaged: its weight_map does not say which file of this folder has which tensor")
    return weight_map


def _wanted(
    source: Source, name: str, offsets: Sequence[int] | None, sizes: Sequence[int] | None
) -> tuple[Spec, tuple[int, ...], tuple[int, ...]]:
    """The tensor's spec, and the box's offsets and sizes."""
    spec = source.tensors.get(name)
    if spec is None:
        raise ValueError(f"{source.path}: no tensor {name}")
    begin = tuple(offsets) if offsets is not None else (0,) * len(spec.shape)
    extent = tuple(sizes) if sizes is not None else tuple(s - o for s, o in zip(spec.shape, begin, strict=True))
    assert all(min(o, n) >= 0 and o + n <= s for o, n, s in zip(begin, extent, spec.shape, strict=True)), name
    return spec, begin, extent
