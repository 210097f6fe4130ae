"""Runs as a page tells them: by a name and a letter, and their numbers in few digits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megadit.history.charts import Series, number
from megadit.history.curve import Curve
from megadit.history.story import Story


@dataclass(frozen=True)
class Told:
    """A run on the page. mark: a letter where there are several. place: of its colour."""

    story: Story
    label: str
    mark: str
    place: int

    def series(self, curve: Curve, kind: str = "", dotted: bool = False) -> Series:
        name = " ".join(part for part in (self.mark and self.label, kind) if part)
        return Series(name, self.mark, curve, self.place, dotted)


def labels(stories: Sequence[Story]) -> list[str]:
    """Names that tell runs apart: with their folders where names are the same, with numbers where those are too."""
    names = [story.name for story in stories]
    told = [
        name if names.count(name) == 1 else f"{name} ({story.folder})"
        for name, story in zip(names, stories, strict=True)
    ]
    return [
        label if told.count(label) == 1 else f"{label}, {told[:place].count(label) + 1}"
        for place, label in enumerate(told)
    ]


def letter(place: int) -> str:
    """A, B, ..., Z, A1, ..."""
    turn, within = divmod(place, 26)
    return chr(ord("A") + within) + (str(turn) if turn else "")


def said(value: float, unit: str = "") -> str:
    """A number; a dash for one that is not known."""
    return f"{number(value)}{unit}" if math.isfinite(value) else "–"


def last_of(curve: Curve) -> str:
    """The last value as it is, finite or not."""
    return number(float(curve.values[-1])) if len(curve) else "–"


def plain(value: object) -> str:
    """Text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
