"""The folder of an encoding: what it was begun with, which units are done, and how it becomes a data set.

    encoding.json          the settings, and what is in each source; written once, at the beginning
    units/00000012.json    commits a unit: written when all its shards are on disk
    shards/                of units that are done; what a kill leaves of others is removed when the encoding goes on
    quarantine.jsonl, empty.safetensors, then manifest.json      the end

All but `commit` are for one rank alone.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megadit.data import manifest
from megadit.data.buckets import Bucket
from megadit.data.encode_unit import EncodedUnit
from megadit.data.manifest import MANIFEST_FILE, SHARDS_FOLDER, Manifest, ShardEntry, shard_path, write_manifest
from megadit.data.quarantine import REASONS, Bad
from megadit.data.shards import Caption, write_empty, write_shard
from megadit.data.sources import Unit
from megadit.data.units import Contents
from megadit.runtime.disk import replace_file

FORMAT = 1
BEGUN_FILE, QUARANTINE_FILE, UNITS_FOLDER = "encoding.json", "quarantine.jsonl", "units"
NAMED = 6  # differences that an error lists


@dataclass(frozen=True)
class _Shard:
    bucket: Bucket
    latent: tuple[int, int, int]
    entry: ShardEntry


@dataclass(frozen=True)
class _Record:
    """A unit that is done."""

    shards: tuple[_Shard, ...]
    bad: tuple[Bad, ...]
    cut: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What became of all samples. cut: captions by encoder; bad: samples by reason; buckets: samples by shape."""

    samples: int
    captions: int
    buckets: Mapping[str, int]
    cut: Mapping[str, int]
    bad: Mapping[str, int]


class EncodingFolder:
    """A data set while it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST_FILE).exists()

    def begun(self, settings: Mapping[str, Any]) -> list[Contents] | None:
        """What is in each source, as it was found at the beginning; None: the encoding has not begun.

        Raises ValueError when it was begun with other settings, naming both, and for a folder of something else.
        """
        path = self.path / BEGUN_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            self._check_empty()
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); choose another folder") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not of format {FORMAT}, the one that this version reads; encode anew")
        before, now = flat(content["settings"]), flat(json.loads(json.dumps(settings)))
        if before != now:
            raise ValueError(
                f"{self.path} was begun with {_difference(before, now)}; ask for that, or choose another folder"
            )
        return [
            Contents(each["mark"], each["samples"], tuple(each["starts"]), tuple(each["repeats"]))
            for each in content["contents"]
        ]

    def _check_empty(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            others = sorted(each.name for each in self.path.iterdir() if each.name not in ("lock", BEGUN_FILE + ".new"))
            if others:
                raise ValueError(f"{self.path} holds something else, such as {others[0]}; choose another folder")

    def begin(self, settings: Mapping[str, Any], contents: Sequence[Contents]) -> None:
        """Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)  # and nothing in it: it has not begun before this file is there
        content = {"format": FORMAT, "settings": settings, "contents": [asdict(each) for each in contents]}
        replace_file(self.path / BEGUN_FILE, json.dumps(content, indent=1).encode() + b"\n")

    def clear(self, units: Sequence[Unit]) -> set[int]:
        """Remove what kills left of units that are not done. The numbers of those that are, with all their shards."""
        for name in (SHARDS_FOLDER, UNITS_FOLDER):
            (self.path / name).mkdir(exist_ok=True)
        done, kept = set(), set()
        for unit in units:
            record = self._record(unit.number)
            if record is not None and all(self._is_there(shard.entry) for shard in record.shards):
                done.add(unit.number)
                kept |= {shard.entry.file for shard in record.shards}
                kept.add(_record_name(unit.number))
        for name in (SHARDS_FOLDER, UNITS_FOLDER):
            for stale in (self.path / name).iterdir():
                if stale.name not in kept:
                    stale.unlink(missing_ok=True)
        return done

    def _is_there(self, entry: ShardEntry) -> bool:
        try:
            return shard_path(self.path, entry.file).stat().st_size == entry.bytes
        except FileNotFoundError:
            return False

    def commit(self, unit: Unit, encoded: EncodedUnit) -> None:
        """Write a unit's shards and, when they are on disk, that it is done. Raises OSError."""
        shards = []
        for bucket, samples in encoded.samples.items():
            name = f"{unit.number:08d}_{bucket}.safetensors"
            channels, height, width = samples[0].latents_CHW.shape
            entry = write_shard(shard_path(self.path, name), samples)
            shards.append(_Shard(bucket, (channels, height, width), entry))
        record = _Record(tuple(shards), tuple(encoded.bad), encoded.cut)
        content = {"source": unit.file.name, "begin": unit.begin, "count": unit.count, **asdict(record)}
        replace_file(
            self.path / UNITS_FOLDER / _record_name(unit.number), json.dumps(content, indent=1).encode() + b"\n"
        )

    def _record(self, number: int) -> _Record | None:
        """None unless the unit is done."""
        try:
            content = json.loads((self.path / UNITS_FOLDER / _record_name(number)).read_bytes())
            shards = tuple(
                _Shard(Bucket(**each["bucket"]), tuple(each["latent"]), ShardEntry(**each["entry"]))
                for each in content["shards"]
            )
            return _Record(shards, tuple(Bad(**each) for each in content["bad"]), content["cut"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _records(self, units: Sequence[Unit]) -> Iterator[_Record]:
        for unit in units:
            record = self._record(unit.number)
            if record is None:
                raise ValueError(
                    f"{self.path}/{UNITS_FOLDER}/{_record_name(unit.number)} is gone or damaged; encode anew"
                )
            yield record

    def finish(self, units: Sequence[Unit], told: Manifest, empty: Caption | None) -> None:
        """Make a data set of the units, all of which are done. `told`: the manifest but for its buckets and counts.

        Raises ValueError if no good sample is left, OSError.
        """
        shards: defaultdict[Bucket, list[ShardEntry]] = defaultdict(list)
        latent: dict[Bucket, tuple[int, int, int]] = {}
        bad: list[Bad] = []
        for record in self._records(units):
            bad += record.bad
            for shard in record.shards:
                shards[shard.bucket].append(shard.entry)
                latent[shard.bucket] = shard.latent
        lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in bad)
        replace_file(self.path / QUARANTINE_FILE, lines.encode())
        if not shards:
            raise ValueError(
                f"{self.path}: no sample is left of {len(bad)}: {_counted(bad)}; see {self.path / QUARANTINE_FILE}"
            )
        if empty is not None:
            write_empty(self.path, empty)
        buckets = tuple(
            manifest.Bucket(bucket.height, bucket.width, latent[bucket], tuple(shards[bucket]))
            for bucket in sorted(shards)
        )
        write_manifest(self.path, Manifest(**(vars(told) | {"buckets": buckets, "quarantined": len(bad)})))

    def report(self, units: Sequence[Unit]) -> Report:
        """Of a data set that is finished."""
        buckets: Counter[Bucket] = Counter()
        cut: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        captions = 0
        for record in self._records(units):
            bad.update(each.reason for each in record.bad)
            cut.update(record.cut)
            for shard in record.shards:
                buckets[shard.bucket] += shard.entry.samples
                captions += shard.entry.captions
        by_reason: dict[str, int] = {reason: bad[reason] for reason in REASONS if bad[reason]}
        by_shape = {str(bucket): buckets[bucket] for bucket in sorted(buckets)}
        return Report(sum(buckets.values()), captions, by_shape, dict(cut), by_reason)


def _record_name(number: int) -> str:
    return f"{number:08d}.json"


def _counted(bad: Sequence[Bad]) -> str:
    return (
        ", ".join(f"{count} {reason}" for reason, count in Counter(each.reason for each in bad).most_common()) or "none"
    )


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary.

    >>> flat({"batch": 8, "autoencoder": {"name": "vae"}, "text": [{"kind": "t5"}]})
    {'batch': 8, 'autoencoder name': 'vae', 'text 0 kind': 't5'}
    """
    if isinstance(settings, Mapping | list):
        pairs = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
        parts = [flat(value, f"{name} {key}".strip()) for key, value in pairs]
        return {key: value for part in parts for key, value in part.items()}
    return {name: settings}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words: the old, then the new."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]

    def said(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={settings.get(name, 'none')}" for name in names[:NAMED])

    more = f" ({len(names) - NAMED} more settings differ)" if len(names) > NAMED else ""
    return f"{said(before)}; this asks for {said(now)}{more}"
