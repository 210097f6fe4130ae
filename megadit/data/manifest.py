"""The manifest of an encoded data set: what made it, its buckets, and the checksums of its shards.

<dataset>/manifest.json               written last: a folder without it is not finished
<dataset>/empty.safetensors           the encoders' empty caption; only with text
<dataset>/shards/<name>.safetensors   samples of one bucket each
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from megadit.runtime.disk import replace_file
from megadit.runtime.tensor_file import DTYPES, Spec, read_header

FORMAT = 1
MANIFEST_FILE = "manifest.json"
EMPTY_FILE = "empty.safetensors"
SHARDS_FOLDER = "shards"
AGAIN = "copy the data set again, or encode it again"

TextKind = Literal["none", "t5", "clip", "t5+clip"]
T = TypeVar("T")


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it.

    file: its name in the folder of shards. longest: tokens of its longest caption. classes: its largest label + 1, 0
    without labels.
    """

    file: str
    samples: int
    captions: int
    longest: int
    classes: int
    bytes: int
    sha256: str
    header_sha256: str


@dataclass(frozen=True)
class Bucket:
    """Samples of one size: `height` and `width` in pixels, `latent` [C, H, W]."""

    height: int
    width: int
    latent: tuple[int, int, int]
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def name(self) -> str:
        """Such as "256x320", height first."""
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class Manifest:
    """What a data set is.

    dtype: of latents and text, such as "bfloat16". autoencoder, text: identities of the encoders. latents: the
    posterior's mean, or a sample of it. resolutions: the rule that made the buckets. quarantined: bad samples left out.
    """

    dtype: str
    autoencoder: dict[str, Any] | None
    latents: Literal["mean", "sample"]
    text_kind: TextKind
    text: tuple[dict[str, Any], ...]
    buckets: tuple[Bucket, ...]
    resolutions: dict[str, Any] = field(default_factory=dict)
    quarantined: int = 0

    @property
    def samples(self) -> int:
        return sum(bucket.samples for bucket in self.buckets)

    @property
    def captions(self) -> int:
        return sum(shard.captions for bucket in self.buckets for shard in bucket.shards)

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return max((shard.longest for bucket in self.buckets for shard in bucket.shards), default=0)

    @property
    def classes(self) -> int:
        """The largest label + 1, 0 without labels."""
        return max((shard.classes for bucket in self.buckets for shard in bucket.shards), default=0)


def shard_path(folder: Path, file: str) -> Path:
    """Where a data set's shard lies."""
    return folder / SHARDS_FOLDER / file


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, all at once: with it the data set is finished. Shards and empty caption are there already."""
    empty = folder / EMPTY_FILE
    content = {
        "format": FORMAT,
        "samples": manifest.samples,
        "captions": manifest.captions,
        "empty_sha256": file_sha256(empty) if manifest.text else None,
        **asdict(manifest),
    }
    for bucket, described in zip(manifest.buckets, content["buckets"], strict=True):
        described["samples"] = bucket.samples
    replace_file(folder / MANIFEST_FILE, json.dumps(content, indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """A data set's manifest alone: what made it. Raises ValueError that names the file, and says what to do."""
    return _parse(folder / MANIFEST_FILE, _content(folder))


def _content(folder: Path) -> dict[str, Any]:
    """The manifest's JSON, of this format. Raises ValueError."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise ValueError(f"data set {folder}: there is no such folder") from error
        raise ValueError(
            f"data set {folder} has no {MANIFEST_FILE}: either it is no encoded data set, or its encoding is not "
            "finished; the encoder goes on where it stopped when it is called again"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON; {AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"{path} is of format {found}, this version reads format {FORMAT}; encode the data set again")
    return content


def open_manifest(folder: Path, verify: bool = False) -> Manifest:
    """Read a data set's manifest and look at every shard: that it is there, of the size and with the header that were
    written. `verify`: that its content is too, which reads everything.

    Raises ValueError that names the file, and says what to do.
    """
    content = _content(folder)
    manifest = _parse(folder / MANIFEST_FILE, content)
    told: dict[str, Spec] = {}
    if manifest.text:
        if file_sha256(folder / EMPTY_FILE) != content.get("empty_sha256"):
            raise ValueError(f"{folder / EMPTY_FILE} has changed since the data set was encoded; {AGAIN}")
        told = {name: entry.spec for name, entry in read_header(folder / EMPTY_FILE).items()}
    for bucket in manifest.buckets:
        for shard in bucket.shards:
            _check_shard(shard_path(folder, shard.file), bucket, shard, manifest.dtype, told, verify)
    return manifest


def _parse(path: Path, content: dict[str, Any]) -> Manifest:
    """The manifest of its JSON. Raises ValueError for what is missing, of another type, or does not add up."""

    def of(value: Any, kind: type[T]) -> T:
        if not isinstance(value, kind):
            raise TypeError(f"{str(value)[:100]!r} is no {kind.__name__}")
        return value

    def shard(value: dict[str, Any]) -> ShardEntry:
        kinds: dict[str, type] = dict.fromkeys(("file", "sha256", "header_sha256"), str)
        names = ShardEntry.__dataclass_fields__
        entry = ShardEntry(**{name: of(value[name], kinds.get(name, int)) for name in names})
        if Path(entry.file).name != entry.file:
            raise TypeError(f"{entry.file!r} is no name of a file")
        return entry

    def bucket(value: dict[str, Any]) -> Bucket:
        channels, height, width = (of(size, int) for size in value["latent"])
        shards = tuple(shard(one) for one in value["shards"])
        found = Bucket(of(value["height"], int), of(value["width"], int), (channels, height, width), shards)
        if found.samples != value["samples"]:
            raise TypeError(f"bucket {found.name} has {found.samples} samples in its shards, not {value['samples']}")
        return found

    try:
        manifest = Manifest(
            dtype=of(content["dtype"], str),
            autoencoder=None if content["autoencoder"] is None else of(content["autoencoder"], dict),
            latents=content["latents"],
            text_kind=content["text_kind"],
            text=tuple(of(one, dict) for one in content["text"]),
            buckets=tuple(bucket(one) for one in content["buckets"]),
            resolutions=of(content["resolutions"], dict),
            quarantined=of(content["quarantined"], int),
        )
        if manifest.dtype not in DTYPES:
            raise TypeError(f"dtype {manifest.dtype!r}")
        if (manifest.samples, manifest.captions) != (content["samples"], content["captions"]):
            raise TypeError("the samples or captions of the shards do not add up to those of the data set")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {what}; {AGAIN}") from error
    return manifest


def _check_shard(
    path: Path, bucket: Bucket, shard: ShardEntry, dtype: str, told: Mapping[str, Spec], verify: bool
) -> None:
    """`told`: the tensors of the empty caption, of the widths that every caption has."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} is missing or cannot be read ({error.strerror}); {AGAIN}") from error
    if size != shard.bytes:
        raise ValueError(f"{path} has {size} bytes, the manifest says {shard.bytes}: it has changed; {AGAIN}")
    if header_sha256(path) != shard.header_sha256:
        raise ValueError(f"{path}: its header is not the one that was written: it has changed; {AGAIN}")
    found = {name: entry.spec for name, entry in read_header(path).items()}
    for name, spec in _expected(bucket, shard, DTYPES[dtype]).items():
        if name not in found or found[name] != spec:
            raise ValueError(f"{path}: {name} is {found.get(name, 'missing')}, the manifest says {spec}; {AGAIN}")
    for name, spec in told.items() if shard.captions else ():
        if name not in found or found[name].shape[1:] != spec.shape[-1:] or found[name].dtype != DTYPES[dtype]:
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'missing')}, but {spec} in the empty caption and {dtype} in the "
                f"manifest; {AGAIN}"
            )
    if verify and file_sha256(path) != shard.sha256:
        raise ValueError(f"{path}: its content has changed since it was written; {AGAIN}")


def _expected(bucket: Bucket, shard: ShardEntry, dtype: torch.dtype) -> dict[str, Spec]:
    """The shard's tensors whose shapes the manifest knows."""
    samples, captions = shard.samples, shard.captions
    specs = {"latents": Spec((samples, *bucket.latent), dtype), "key_begin": Spec((samples + 1,), torch.int64)}
    if shard.classes:
        specs["labels"] = Spec((samples,), torch.int64)
    if captions:
        specs["caption_begin"] = Spec((samples + 1,), torch.int64)
        specs["caption_weight"] = Spec((captions,), torch.float32)
        specs["token_begin"] = Spec((captions + 1,), torch.int64)
    return specs


def header_sha256(path: Path) -> str:
    """Of a safetensors file's header, its length included. Raises ValueError naming it when it cannot be read."""
    try:
        with path.open("rb") as file:
            length = file.read(8)
            return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), 1 << 27))).hexdigest()
    except OSError as error:
        raise ValueError(f"{path} is missing or cannot be read ({error.strerror}); {AGAIN}") from error


def file_sha256(path: Path) -> str:
    """Of a whole file. Raises ValueError naming it when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} is missing or cannot be read ({error.strerror}); {AGAIN}") from error
