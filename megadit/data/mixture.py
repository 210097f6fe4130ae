"""Encoded data sets as one training reads them: checked against each other, mixed, cut into buckets and two splits."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from megadit.data.manifest import Bucket, Manifest, open_manifest, shard_path
from megadit.data.order import permute, round_keys, shares, within
from megadit.data.shards import Caption, ShardReader, read_empty
from megadit.runtime.tensor_file import Entry

T = TypeVar("T")
Split = Literal["train", "heldout"]
Place = tuple[Path, int]  # a shard, and a sample in it

# Two files each: the shard, and its map. Processes are often limited to 1024.
_OPEN_SHARDS = 128
_KNOWN_HEADERS = 8192  # of shards that were open: a few kilobytes each


@dataclass(frozen=True)
class Source:
    """One data set of a mixture."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Wanted:
    """What a training wants of its data.

    global_batch: samples of a step. length: text tokens that the network reads; 0 with class conditioning. classes: of
    the network, 0 with text. weights: how often each data set is drawn, in any unit; none: every sample as often as any
    other. heldout: one sample in so many is held out; 0: none. small_buckets: what becomes of a bucket with fewer
    samples than a batch. too_long: what becomes of captions with more than `length` tokens.
    """

    global_batch: int
    length: int = 0
    classes: int = 0
    weights: Sequence[float] = ()
    heldout: int = 100
    small_buckets: Literal["error", "drop"] = "error"
    too_long: Literal["cut", "error"] = "cut"


@dataclass(frozen=True)
class MixedBucket:
    """A bucket of all data sets; `samples` are those to train on."""

    name: str
    height: int
    width: int
    latent: tuple[int, int, int]
    samples: int


def open_sources(folders: Sequence[str | Path], verify: bool = False) -> list[Source]:
    """Open data sets; `verify` reads all of them. Raises ValueError naming the folder or file at fault."""
    if not folders:
        raise ValueError("no data set is named")
    paths = [Path(folder).expanduser() for folder in folders]
    return [Source(path, open_manifest(path, verify)) for path in paths]


class Mixture:
    """Data sets that belong together, and where their samples are. Any number of threads may use it."""

    def __init__(self, sources: Sequence[Source], wanted: Wanted) -> None:
        """Raises ValueError that says what to change for data sets that do not fit each other or what is wanted."""
        assert (wanted.length > 0) != (wanted.classes > 0), "text has a length, or classes have a number"
        self.sources, self.wanted = list(sources), wanted
        # Of each data set by bucket; counted once, for a bucket may have very many shards.
        self._totals = [{bucket.name: bucket.samples for bucket in source.manifest.buckets} for source in sources]
        _check_weights(sources, wanted)
        for source in sources:
            _check_told(source, wanted)
            _check_alike(sources[0], source)
        # Of the first: encoders that are the same make the same of an empty caption.
        self.empty = read_empty(sources[0].folder) if wanted.length else None
        self.dropped: list[str] = []  # names of buckets
        self.buckets = self._mixed_buckets()
        self.shares = shares([self._counts(d, "train") for d in range(len(sources))], wanted.weights)
        self._ends: dict[tuple[int, str], np.ndarray] = {}  # of each shard, counted in samples of its bucket
        self._paths: dict[tuple[int, str], list[Path]] = {}
        for d, source in enumerate(sources):
            for bucket in source.manifest.buckets:
                self._ends[d, bucket.name] = np.cumsum([shard.samples for shard in bucket.shards])
                self._paths[d, bucket.name] = [shard_path(source.folder, shard.file) for shard in bucket.shards]
        self._readers: OrderedDict[Path, ShardReader] = OrderedDict()
        self._headers: OrderedDict[Path, Mapping[str, Entry]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and text on disk."""
        return getattr(torch, self.sources[0].manifest.dtype)

    @property
    def num_samples(self) -> int:
        """To train on."""
        return sum(bucket.samples for bucket in self.buckets)

    @property
    def text_channels(self) -> int:
        """Width of a token's state; 0 without text."""
        return 0 if self.empty is None else self.empty.states_LC.shape[1]

    @property
    def pooled_channels(self) -> int:
        """Width of a caption's pooled vector; 0 where there is none."""
        return 0 if self.empty is None or self.empty.pooled_P is None else len(self.empty.pooled_P)

    def num_heldout(self, dataset: int, bucket: str) -> int:
        """Held-out samples of a data set's bucket."""
        total = self._totals[dataset].get(bucket, 0)
        return max(1, total // self.wanted.heldout) if self.wanted.heldout and total else 0

    def heldout_counts(self) -> list[dict[str, int]]:
        """Held-out samples of each data set by bucket."""
        return [self._counts(d, "heldout") for d in range(len(self.sources))]

    def nothing(self) -> dict[str, Tensor]:
        """What the network is told of a sample that is told nothing, [1, ...]: the encoders' own empty caption, or the
        class after the last.
        """
        if self.empty is None:
            return {"labels_B": torch.tensor([self.wanted.classes])}
        return padded(self.empty, self.wanted.length)

    def num_too_long(self) -> int:
        """Captions of more tokens than the network reads. Reads the lengths of all captions where there are any."""
        return sum(
            int((self.reader(shard_path(source.folder, shard.file)).caption_lengths() > self.wanted.length).sum())
            for source in self.sources
            for bucket in source.manifest.buckets
            for shard in bucket.shards
            if self.wanted.length and shard.longest > self.wanted.length
        )

    def locate(self, split: Split, dataset: int, bucket: str, index_N: np.ndarray) -> list[Place]:
        """Where samples of a data set's bucket are; they are counted within their split."""
        total = self._totals[dataset][bucket]
        first = 0 if split == "train" else total - self.num_heldout(dataset, bucket)
        # What is held out belongs to the data set, not to a run: the same for every seed.
        place_N = permute(index_N + first, total, round_keys(0, "split", bucket)).astype(np.int64)
        ends, paths = self._ends[dataset, bucket], self._paths[dataset, bucket]
        shard_N, row_N = within(ends, place_N)
        return [(paths[shard], row) for shard, row in zip(shard_N.tolist(), row_N.tolist(), strict=True)]

    def reader(self, path: Path) -> ShardReader:
        """An open shard, one of the last that were used. Raises ValueError naming the file."""
        with self._lock:
            if path in self._readers:
                self._readers.move_to_end(path)
                return self._readers[path]
            entries = self._headers.get(path)
        reader = ShardReader(path, entries)  # another thread may open it too, which does no harm
        with self._lock:
            _keep(self._readers, path, reader, _OPEN_SHARDS)
            _keep(self._headers, path, reader.entries, _KNOWN_HEADERS)
        return reader

    def _counts(self, dataset: int, split: Split) -> dict[str, int]:
        """Samples of a data set's split by bucket, without buckets that are dropped."""
        found = {}
        for name, total in self._totals[dataset].items():
            if name not in self.dropped:
                heldout = self.num_heldout(dataset, name)
                found[name] = heldout if split == "heldout" else total - heldout
        return found

    def _mixed_buckets(self) -> list[MixedBucket]:
        """All buckets that fill a batch, by name. Raises ValueError for others, unless they are dropped."""
        first: dict[str, tuple[Source, Bucket]] = {}
        for source in self.sources:
            for bucket in source.manifest.buckets:
                other, same = first.setdefault(bucket.name, (source, bucket))
                if same.latent != bucket.latent:
                    raise ValueError(
                        f"bucket {bucket.name} has latents of {list(same.latent)} in {other.folder} and of "
                        f"{list(bucket.latent)} in {source.folder}; encode both with one autoencoder"
                    )
        samples = {
            name: sum(self._counts(d, "train").get(name, 0) for d in range(len(self.sources))) for name in sorted(first)
        }
        small = [name for name in samples if samples[name] < self.wanted.global_batch]
        if small and self.wanted.small_buckets == "error":
            told = ", ".join(f"{name} ({samples[name]} samples)" for name in small)
            fits = max(1, min(samples.values()))
            raise ValueError(
                f"buckets that do not fill a batch of data.global_batch={self.wanted.global_batch}: {told}; set "
                f"data.global_batch to at most {fits}, encode with fewer buckets, or set data.small_buckets=drop"
            )
        self.dropped = small
        for d, source in enumerate(self.sources):
            if not sum(self._counts(d, "train").values()):
                raise ValueError(
                    f"data set {source.folder} is empty: of its {source.manifest.samples} samples none is left to "
                    f"train on{_why_empty(small, self.wanted)}"
                )
        sizes = {name: (bucket.height, bucket.width, bucket.latent) for name, (_, bucket) in first.items()}
        return [MixedBucket(name, *sizes[name], samples[name]) for name in samples if name not in small]


def _keep(known: OrderedDict[Path, T], path: Path, value: T, most: int) -> None:
    """Remember a file's value, and of all only the last ones."""
    known[path] = value
    known.move_to_end(path)
    while len(known) > most:
        known.popitem(last=False)


def padded(caption: Caption, length: int) -> dict[str, Tensor]:
    """A caption's keywords, [1, ...]: its states cut or padded with zeros to `length` tokens, and their mask."""
    states_LC = caption.states_LC[:length]
    states_BLC = states_LC.new_zeros(1, length, states_LC.shape[1])
    states_BLC[0, : len(states_LC)] = states_LC
    told = {"text_states_BLC": states_BLC, "text_mask_BL": torch.arange(length)[None] < len(states_LC)}
    return told if caption.pooled_P is None else told | {"text_pooled_BP": caption.pooled_P[None]}


def _why_empty(small: Sequence[str], wanted: Wanted) -> str:
    reasons = []
    if small:
        reasons.append(f"dropped buckets, of less than data.global_batch={wanted.global_batch}: {', '.join(small)}")
    if wanted.heldout:
        reasons.append(f"held out: one in {wanted.heldout}, and at least one of a bucket")
    return "".join(f"; {reason}" for reason in reasons)


def _check_weights(sources: Sequence[Source], wanted: Wanted) -> None:
    if wanted.weights and len(wanted.weights) != len(sources):
        raise ValueError(f"{len(wanted.weights)} weights for {len(sources)} data sets; give each data set one, or none")
    for source, weight in zip(sources, wanted.weights, strict=False):
        if not 0 < weight < float("inf"):
            raise ValueError(f"data set {source.folder} has weight {weight}; leave it out, or give it more than 0")


def _check_told(source: Source, wanted: Wanted) -> None:
    """That the data set has captions, or classes, as the network reads them."""
    manifest = source.manifest
    if wanted.classes:
        if manifest.samples and not manifest.classes:
            raise ValueError(f"data set {source.folder} has no labels; encode it with classes, or train with captions")
        if manifest.classes > wanted.classes:
            raise ValueError(
                f"data set {source.folder} has classes up to {manifest.classes - 1}, model.classes={wanted.classes} "
                f"has no room for them; set model.classes={manifest.classes}"
            )
        return
    if manifest.text_kind == "none" and manifest.samples:
        raise ValueError(f"data set {source.folder} has no captions; encode it with them, or train with classes")
    if wanted.too_long == "error" and manifest.longest > wanted.length:
        raise ValueError(
            f"data set {source.folder} has captions of up to {manifest.longest} tokens, text.length={wanted.length}; "
            f"set text.length={manifest.longest}, or text.too_long=cut"
        )


def _check_alike(one: Source, other: Source) -> None:
    """That two data sets may be mixed."""
    a, b = one.manifest, other.manifest
    if a.dtype != b.dtype:
        raise ValueError(f"{one.folder} is of {a.dtype}, {other.folder} of {b.dtype}; encode both in one dtype")
    if (a.autoencoder is None) != (b.autoencoder is None) or not _same(a.autoencoder or {}, b.autoencoder or {}):
        raise ValueError(
            f"the latents of {one.folder} are of the autoencoder {_named(a.autoencoder)}, those of {other.folder} of "
            f"{_named(b.autoencoder)}; encode both with one"
        )
    if len(a.text) != len(b.text) or not all(_same(x, y) for x, y in zip(a.text, b.text, strict=True)):
        raise ValueError(
            f"the captions of {one.folder} are of {_all_named(a.text)}, those of {other.folder} of "
            f"{_all_named(b.text)}; encode both with the same encoders"
        )


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities are of one encoder. A fingerprint is of its weights, whatever they are called."""
    aside = {"length"} | ({"name", "revision"} if one.get("fingerprint") and other.get("fingerprint") else set())
    return all(one.get(key) == other.get(key) for key in (one.keys() | other.keys()) - aside)


def check_encoders(
    sources: Sequence[Source], text: Sequence[Mapping[str, Any]], autoencoder: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError naming both where a data set was encoded by others than those that are asked for.

    An encoder is asked for by some keys of its identity, such as {"kind": "t5", "name": "google/t5-v1_1-xxl"}.
    """
    for source in sources:
        made = source.manifest.text
        is_asked = len(made) == len(text) and all(map(_is, made, text))
        if not is_asked:
            raise ValueError(
                f"data set {source.folder} has captions of {_all_named(made)}, the configuration asks for "
                f"{_all_named(text)}; change section text, or encode the data set with these"
            )
        if autoencoder is not None and not _is(source.manifest.autoencoder or {}, autoencoder):
            raise ValueError(
                f"data set {source.folder} has latents of the autoencoder {_named(source.manifest.autoencoder)}, the "
                f"configuration asks for {_named(autoencoder)}; change it, or encode the data set with this one"
            )


def _is(identity: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    return all(identity.get(key) == value for key, value in asked.items())


def _named(identity: Mapping[str, Any] | None) -> str:
    """An encoder by what tells it from others."""
    if not identity:
        return "none"
    shown = ("kind", "class", "name", "revision", "channels", "scaling_factor", "shift_factor", "fingerprint")
    return " ".join(f"{key}={identity[key]}" for key in shown if identity.get(key) not in (None, ""))


def _all_named(identities: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(map(_named, identities)) or "no text encoder"
