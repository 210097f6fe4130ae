"""The safetensors format, streamed: a table of tensors in JSON, then their bytes without gaps.

The library's own reader maps a file, and mapped pages count as this process's memory; its writer wants all tensors at
once. Here a file is read box by box, and written tensor by tensor, rows at a time. A file comes from anywhere, so
nothing in its header is believed before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

CODES = {  # what safetensors calls the dtypes that we keep
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
_OF_CODE = {code: dtype for dtype, code in CODES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; as the library has it
_CHUNK = 1 << 24  # bytes read at a time where rows are only partly wanted


class Spec(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Entry(NamedTuple):
    """A tensor in a safetensors file: `begin` is its first byte, counted from the beginning of the file."""

    spec: Spec
    begin: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file. Reads nothing else of it.

    Raises ValueError naming the file unless the header is whole and its tensors fill the file exactly.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"{path} is no whole safetensors file: {size} bytes, of which {length} of header")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its safetensors header is no table of tensors")
    header.pop("__metadata__", None)
    start, entries = 8 + length, {}
    for name, entry in header.items():
        entries[name] = _entry(f"{path}: tensor {name}", entry, start)
    end = start
    for name, found in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].spec.num_bytes)):
        if found.begin != end:
            raise ValueError(f"{path} is damaged: tensor {name} begins at byte {found.begin}, not at {end}")
        end += found.spec.num_bytes
    if end != size:
        raise ValueError(f"{path} is damaged: its tensors end at byte {end}, the file at {size}")
    return entries


def _entry(what: str, entry: object, start: int) -> Entry:
    if not isinstance(entry, dict) or not (are_sizes(entry.get("shape")) and are_sizes(entry.get("data_offsets"))):
        raise ValueError(f"{what}: damaged header entry {str(entry)[:200]}")
    code = str(entry.get("dtype"))
    if code not in _OF_CODE:
        raise ValueError(f"{what} is of dtype {code}; known are {', '.join(_OF_CODE)}")
    spec = Spec(tuple(entry["shape"]), _OF_CODE[code])
    if len(entry["data_offsets"]) != 2 or entry["data_offsets"][1] - entry["data_offsets"][0] != spec.num_bytes:
        raise ValueError(f"{what}: shape {spec.shape} does not fill the bytes {entry['data_offsets']}")
    return Entry(spec, start + entry["data_offsets"][0])


def are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_box(path: Path, entry: Entry, offsets: Sequence[int], out: Tensor) -> None:
    """Fill `out`, of any strides, with the box at `offsets` of a tensor of a safetensors file.

    Reads whole rows, as few as there are, in chunks: beside `out` only a few megabytes are held. Raises ValueError
    naming the file.
    """
    if out.numel() == 0:
        return
    try:
        with path.open("rb", buffering=0) as file:
            _fill(file.fileno(), entry.begin, entry.spec.shape, tuple(offsets), out)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except EOFError as error:
        raise ValueError(f"{path} ends too early: it was cut short") from error


def _fill(file: int, begin: int, shape: tuple[int, ...], offsets: tuple[int, ...], out: Tensor) -> None:
    """Fill `out` with a box of the row-major tensor of `shape` at byte `begin`."""
    if not shape:
        shape, offsets, out = (1,), (0,), out.view(1)
    row = math.prod(shape[1:]) * out.element_size()
    begin += offsets[0] * row
    if tuple(out.shape[1:]) == shape[1:] and out.is_contiguous():
        read_bytes(file, begin, bytes_of(out))
        return
    if row > _CHUNK and len(shape) > 2:
        for index in range(out.shape[0]):
            _fill(file, begin + index * row, shape[1:], offsets[1:], out[index])
        return
    for first in range(0, out.shape[0], max(1, _CHUNK // row)):
        rows = out[first : first + max(1, _CHUNK // row)]
        whole = torch.empty((rows.shape[0], *shape[1:]), dtype=out.dtype)
        read_bytes(file, begin + first * row, bytes_of(whole))
        for dim in range(1, whole.ndim):
            whole = whole.narrow(dim, offsets[dim], out.shape[dim])
        rows.copy_(whole)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_bytes(file: int, begin: int, out: memoryview) -> None:
    """Fill `out` with what lies at byte `begin` of an open file. Raises EOFError when the file ends before, OSError."""
    while out:
        count = os.preadv(file, [out[: 1 << 30]], begin)
        if count == 0:
            raise EOFError
        out, begin = out[count:], begin + count


AnyWriter = TypeVar("AnyWriter", bound="TensorFileWriter")


class TensorFileWriter:
    """Writes a safetensors file tensor by tensor, so that one of them is held at a time.

    `order` says in which order `write` expects them: the widest dtype first, since the format packs without gaps and so
    each tensor is still aligned.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> None:
        """Creates the file, which must not be there. `metadata` is what safetensors keeps of its name in the header."""
        self.path = path
        self.order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in self.order:
            spec = tensors[name]
            header[name] = {
                "dtype": CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.num_bytes],
            }
            end += spec.num_bytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.size, self._written = 8 + len(encoded) + end, 0
        self._file = path.open("xb", buffering=0)
        self._put(memoryview(len(encoded).to_bytes(8, "little") + encoded))

    def write(self, tensor: Tensor) -> None:
        """Append a tensor, or some rows of one, in any layout and on any device."""
        self._put(bytes_of(tensor.detach().cpu().contiguous()))

    def _put(self, block: memoryview) -> None:
        try:
            while block:
                count = self._file.write(block[: 1 << 30])
                assert count is not None
                self._written, block = self._written + count, block[count:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error  # which does not name it by itself

    def close(self) -> None:
        """Put the file on disk. Every byte that the header promises must have been written."""
        assert self._written == self.size, f"{self.path}: {self._written} bytes of {self.size}"
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self: AnyWriter) -> AnyWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class HashedTensorFileWriter(TensorFileWriter):
    """Knows the sha256 of what it has written."""

    def __init__(self, path: Path, tensors: Mapping[str, Spec]) -> None:
        self.digest = hashlib.sha256()
        super().__init__(path, tensors)

    def _put(self, block: memoryview) -> None:
        self.digest.update(block)
        super()._put(block)
