"""Shards of encoded data sets: safetensors files of latents and text states, one bucket each.

A shard of N samples with M captions. A sample has any number of captions, and a caption any number of tokens, so both
lie end to end, and an array of N + 1 or M + 1 places says where each begins:

    latents          [N, C, H, W]          in the data set's dtype
    key_begin, keys  [N + 1], [bytes]      UTF-8 names of the samples
    labels           [N]                   int64; only of class-conditioned sets
    caption_begin    [N + 1]               the captions of sample i are rows begin[i] to begin[i + 1]; only with text
    caption_weight   [M]                   float32
    token_begin      [M + 1]               the tokens of caption m are rows begin[m] to begin[m + 1] of states
    states           [tokens, C]           in the data set's dtype; true tokens, no padding
    pooled           [M, P]                in the data set's dtype; only of encoders that have one

The empty caption, what guidance steers away from, is a file of its own: states [L, C], pooled [P].
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megadit.data.manifest import AGAIN, EMPTY_FILE, ShardEntry, header_sha256
from megadit.runtime.disk import sync_folder
from megadit.runtime.tensor_file import Entry, HashedTensorFileWriter, Spec, bytes_of, read_bytes, read_header

Column = tuple[Spec, Sequence[Tensor]]  # a tensor of a file, and the parts that it is written of


@dataclass(frozen=True)
class Caption:
    """What the text encoders made of one caption: states of its tokens, without padding, and perhaps a pooled vector.

    weight: how often it is drawn, relative to the sample's other captions.
    """

    states_LC: Tensor
    pooled_P: Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One image, encoded, with its captions or its class."""

    key: str
    latents_CHW: Tensor
    captions: Sequence[Caption] = ()
    label: int | None = None


def write_shard(path: Path, samples: Sequence[Sample]) -> ShardEntry:
    """Write samples of one bucket; the file has its name only when it is whole and on disk.

    The same samples make the same bytes. Either all samples have a label or none, and either all captions have a pooled
    vector or none; latents, states and pooled vectors have one dtype each.
    """
    captions = [caption for sample in samples for caption in sample.captions]
    file = _write(path, _columns(samples, captions))
    return ShardEntry(
        file=path.name,
        samples=len(samples),
        captions=len(captions),
        longest=max((len(caption.states_LC) for caption in captions), default=0),
        classes=max((-1 if sample.label is None else sample.label for sample in samples), default=-1) + 1,
        bytes=file.size,
        sha256=file.digest.hexdigest(),
        header_sha256=header_sha256(path),
    )


def _write(path: Path, columns: Mapping[str, Column]) -> HashedTensorFileWriter:
    """Write a file that has its name only when it is whole and on disk; what wrote it knows its size and digest."""
    partial = path.with_name(path.name + ".new")
    partial.unlink(missing_ok=True)  # of a killed process
    with HashedTensorFileWriter(partial, {name: spec for name, (spec, _) in columns.items()}) as file:
        for name in file.order:
            for tensor in columns[name][1]:
                file.write(tensor)
    os.replace(partial, path)
    sync_folder(path.parent)
    return file


def _columns(samples: Sequence[Sample], captions: Sequence[Caption]) -> dict[str, Column]:
    """The shard's tensors by name."""
    assert samples and all(sample.key for sample in samples), "a shard has samples, and they have names"
    keys = [sample.key.encode() for sample in samples]
    columns: dict[str, Column] = {
        "latents": _stack([sample.latents_CHW for sample in samples]),
        "key_begin": _array(torch.tensor([0, *accumulate(map(len, keys))])),
        "keys": _array(torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)),
    }
    labels = [sample.label for sample in samples if sample.label is not None]
    if labels:
        assert len(labels) == len(samples) and min(labels) >= 0, "all samples have a label, or none"
        columns["labels"] = _array(torch.tensor(labels, dtype=torch.int64))
    if captions:
        assert all(sample.captions for sample in samples), "all samples have captions, or none"
        assert all(0 < caption.weight < math.inf for caption in captions)
        states = [caption.states_LC for caption in captions]
        spec = Spec((sum(map(len, states)), states[0].shape[1]), states[0].dtype)
        assert all((one.shape[1], one.dtype) == (spec.shape[1], spec.dtype) for one in states), "one width and dtype"
        columns["caption_begin"] = _array(torch.tensor([0, *accumulate(len(sample.captions) for sample in samples)]))
        weights = torch.tensor([caption.weight for caption in captions], dtype=torch.float32)
        columns["caption_weight"] = _array(weights)
        columns["token_begin"] = _array(torch.tensor([0, *accumulate(map(len, states))]))
        columns["states"] = (spec, states)
        pooled = [caption.pooled_P for caption in captions if caption.pooled_P is not None]
        if pooled:
            assert len(pooled) == len(captions), "all captions have a pooled vector, or none"
            columns["pooled"] = _stack(pooled)
    assert labels or captions, "samples have captions or labels"
    return columns


def _array(tensor: Tensor) -> Column:
    return Spec(tuple(tensor.shape), tensor.dtype), [tensor]


def _stack(tensors: list[Tensor]) -> Column:
    """Of one shape, to be written one after the other: nothing is copied."""
    first = tensors[0]
    assert all((t.shape, t.dtype) == (first.shape, first.dtype) for t in tensors), "a shard is of one shape and dtype"
    return Spec((len(tensors), *first.shape), first.dtype), tensors


def write_empty(folder: Path, empty: Caption) -> None:
    """Write what the text encoders make of the empty caption, in the data set's dtype."""
    columns = {"states": _array(empty.states_LC)}
    if empty.pooled_P is not None:
        columns["pooled"] = _array(empty.pooled_P)
    _write(folder / EMPTY_FILE, columns)


def read_empty(folder: Path) -> Caption:
    """The empty caption of a data set that has text. Raises ValueError naming the file."""
    reader = _Reader(folder / EMPTY_FILE)
    states, pooled = reader.entries.get("states"), reader.entries.get("pooled")
    if states is None or len(states.spec.shape) != 2 or (pooled is not None and len(pooled.spec.shape) != 1):
        raise ValueError(f"{reader.path} is no empty caption: it has {_described(reader.entries)}; {AGAIN}")
    return Caption(reader.whole("states"), None if pooled is None else reader.whole("pooled"))


def _described(entries: Mapping[str, Entry]) -> str:
    return ", ".join(f"{name} {entry.spec}" for name, entry in sorted(entries.items())) or "no tensors"


class _Reader:
    """An open safetensors file: small arrays are mapped, rows are read.

    Mapped pages are read as they are touched, so looking a sample up reads a few kilobytes. Rows are read by `preadv`
    into the caller's memory, since that is one system call, without the interpreter's lock, where copying from a map
    takes a fault every few pages: 1.5 to 2 times as fast from disk for rows of 150 KB, and a file that is cut short
    is an error, not a signal that ends the process. The small arrays, mapped, have no such protection: where a shard is
    cut short under a running training, touching those that were cut off is SIGBUS.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None) -> None:
        """`entries`: what an earlier reader found, for reading a header takes longer than reading a sample. Raises
        ValueError naming the file unless its header is whole.
        """
        self.path = path
        self.entries = read_header(path) if entries is None else entries
        self._row_bytes = {
            name: math.prod(entry.spec.shape[1:]) * entry.spec.dtype.itemsize for name, entry in self.entries.items()
        }
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path} is missing or cannot be read ({error.strerror}); {AGAIN}") from error
        weakref.finalize(self, os.close, self._file)  # whoever still reads keeps the file open
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)

    def array(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """A tensor, mapped."""
        entry = self._entry(name)
        return np.frombuffer(self._map, dtype, entry.spec.numel, entry.begin).reshape(entry.spec.shape)

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor."""
        self._entry(name)
        return self._row_bytes[name]

    def read_rows(self, name: str, begin: int, out: memoryview) -> None:
        """Fill bytes with a tensor's rows from `begin` on. Raises ValueError when the file ends before."""
        place = self._entry(name).begin + begin * self.row_bytes(name)
        try:
            read_bytes(self._file, place, out)
        except EOFError as error:
            raise ValueError(f"{self.path} ends too early: it was cut short; {AGAIN}") from error
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror}") from error

    def whole(self, name: str) -> Tensor:
        """A tensor, copied."""
        spec = self._entry(name).spec
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if tensor.numel():
            self.read_rows(name, 0, bytes_of(tensor))
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(f"{self.path} has no {name}, only {_described(self.entries)}; {AGAIN}")
        return self.entries[name]


class ShardReader(_Reader):
    """An open shard. Any number of threads may read it."""

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None) -> None:
        """`entries`: of an earlier reader of it. Raises ValueError naming the file for what is no shard."""
        super().__init__(path, entries)
        self._key_begin = self._begins("key_begin", self._entry("keys").spec.shape[0])
        if len(self._key_begin) != self._entry("latents").spec.shape[0] + 1:
            raise ValueError(f"{path} is damaged: {_described(self.entries)}; {AGAIN}")
        self._labels = self.array("labels", np.int64) if "labels" in self.entries else None
        if "caption_begin" in self.entries:
            self._weights = self.array("caption_weight", np.float32)
            self._caption_begin = self._begins("caption_begin", len(self._weights))
            self._token_begin = self._begins("token_begin", self._entry("states").spec.shape[0])

    def __len__(self) -> int:
        return len(self._key_begin) - 1

    def _begins(self, name: str, end: int) -> np.ndarray:
        begins = self.array(name, np.int64)
        if begins.ndim != 1 or len(begins) == 0 or begins[0] != 0 or begins[-1] != end:
            raise ValueError(f"{self.path} is damaged: {name} does not lead from 0 to {end}; {AGAIN}")
        return begins

    def _rows(self, begins: np.ndarray, index: int) -> range:
        begin, end = int(begins[index]), int(begins[index + 1])
        if not 0 <= begin <= end <= begins[-1]:
            raise ValueError(f"{self.path} is damaged: no place {begin} to {end}; {AGAIN}")
        return range(begin, end)

    def key(self, index: int) -> str:
        """The name of a sample."""
        rows = self._rows(self._key_begin, index)
        return bytes(self.array("keys", np.uint8)[rows.start : rows.stop]).decode()

    def label(self, index: int) -> int:
        """The class of a sample. Raises ValueError if the set has none."""
        if self._labels is None:
            raise ValueError(f"{self.path} has no labels, only {_described(self.entries)}; {AGAIN}")
        return int(self._labels[index])

    def captions(self, index: int) -> range:
        """The numbers of a sample's captions, which count through the shard."""
        return self._rows(self._caption_begin, index)

    def weights(self, index: int) -> np.ndarray:
        """float32, of a sample's captions."""
        rows = self.captions(index)
        return self._weights[rows.start : rows.stop]

    def num_tokens(self, caption: int) -> int:
        """Of a caption."""
        return len(self._rows(self._token_begin, caption))

    def caption_lengths(self) -> np.ndarray:
        """int64 [M], tokens of every caption."""
        return np.diff(self._token_begin)

    def read_latents(self, index: int, out: memoryview) -> None:
        """Fill bytes with a sample's latents."""
        self.read_rows("latents", index, out)

    def read_states(self, caption: int, out: memoryview) -> int:
        """Fill bytes with a caption's states, or as many of its first as there is room for; their number."""
        rows, row_bytes = self._rows(self._token_begin, caption), self.row_bytes("states")
        count = min(len(rows), len(out) // row_bytes)
        self.read_rows("states", rows.start, out[: count * row_bytes])
        return count

    def read_pooled(self, caption: int, out: memoryview) -> None:
        """Fill bytes with a caption's pooled vector."""
        self.read_rows("pooled", caption, out)

    def sample(self, index: int) -> Sample:
        """A whole sample, as it was written."""

        def read(name: str, shape: tuple[int, ...], fill: Callable[[memoryview], object]) -> Tensor:
            tensor = torch.empty(shape, dtype=self._entry(name).spec.dtype)
            if tensor.numel():
                fill(bytes_of(tensor))
            return tensor

        def shape(name: str) -> tuple[int, ...]:
            return self._entry(name).spec.shape[1:]

        def caption(number: int) -> Caption:
            tokens = self.num_tokens(number)
            states = read("states", (tokens, *shape("states")), lambda out: self.read_states(number, out))
            has_pooled = "pooled" in self.entries
            pooled = read("pooled", shape("pooled"), lambda out: self.read_pooled(number, out)) if has_pooled else None
            return Caption(states, pooled, float(self._weights[number]))

        latents = read("latents", shape("latents"), lambda out: self.read_latents(index, out))
        captions = [caption(number) for number in self.captions(index)] if "caption_begin" in self.entries else []
        return Sample(self.key(index), latents, captions, None if self._labels is None else self.label(index))
