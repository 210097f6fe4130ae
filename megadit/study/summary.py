"""Records of a study's trials, by variant, and their means over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megadit.study.interval import Interval, compared, interval

Record = Mapping[str, Any]


class Measure(NamedTuple):
    """A figure of a trial. of: from its record. unit: what it is multiplied with when it is written."""

    name: str
    of: Callable[[Record], float | None]
    larger_is_better: bool
    digits: int
    scale: float = 1.0


def task_rate(task: str, kind: str) -> Callable[[Record], float | None]:
    """Fraction of a task's pictures that are right; None where there are none."""

    def of(record: Record) -> float | None:
        counts = record["score"]["tasks"].get(task, {}).get(kind)
        return counts["right"] / counts["asked"] if counts else None

    return of


HELDOUT_LOSS = Measure("held-out loss", lambda record: record["heldout_loss"], False, 4)
SCORE = Measure("score, %", lambda record: record["score"]["score"], True, 1, 100)
SCORE_HELDOUT = Measure(
    "score on held-out combinations, %", lambda record: record["score"]["score_heldout"], True, 1, 100
)
STEP_TIME = Measure("seconds per step", lambda record: record["seconds_per_step"], False, 3)


class Variant(NamedTuple):
    """The trials of one variant, by seed."""

    name: str
    label: str
    records: list[Record]

    def interval(self, measure: Measure) -> Interval | None:
        """Over the seeds; None where a trial has no such figure."""
        values = [measure.of(record) for record in self.records]
        known = [value for value in values if value is not None]
        return interval(known) if len(known) == len(values) else None


def read_records(folder: Path) -> list[Variant]:
    """In the order of the study. Raises ValueError naming the folder or file at fault."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: no records; tools/reproduce.py run makes them")
    records = []
    for path in paths:
        try:
            records.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    found: dict[str, Variant] = {}
    for record in sorted(records, key=lambda record: (record["place"], record["seed"])):
        variant = found.setdefault(record["variant"], Variant(record["variant"], record["label"], []))
        variant.records.append(record)
    seeds = {variant.name: [record["seed"] for record in variant.records] for variant in found.values()}
    if len({tuple(each) for each in seeds.values()}) > 1:
        raise ValueError(f"{folder}: not every variant has every seed: {seeds}; run the study to its end")
    return list(found.values())


def verdict(one: Variant, first: Variant, measure: Measure) -> str:
    """How a variant compares with the first one; "" without such a figure."""
    mine, other = one.interval(measure), first.interval(measure)
    if mine is None or other is None:
        return ""
    return compared(mine, other, measure.larger_is_better)


def difference(one: Variant, first: Variant, measure: Measure) -> Interval | None:
    """The mean over the seeds of what a trial has more than the first variant's of the same seed."""
    pairs = [(measure.of(a), measure.of(b)) for a, b in zip(one.records, first.records, strict=True)]
    known = [a - b for a, b in pairs if a is not None and b is not None]
    return interval(known) if len(known) == len(pairs) else None


def tasks_of(variants: Sequence[Variant]) -> list[str]:
    """The tasks that were judged."""
    return list(variants[0].records[0]["score"]["tasks"])
