"""The events of a run as a table: what happened when, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import NamedTuple

from megadit.history.look import SIGNS, sign_of
from megadit.history.outcome import STARTS, duration, restarts
from megadit.history.story import Event
from megadit.history.told import plain
from megadit.page.markup import Markup
from megadit.page.parts import table

ROWS = 300  # of a table; of more, the first and the last are shown
WORDS = 400  # letters of a reason, and of what else an event tells


class Row(NamedTuple):
    """Of the table; `name` is the style's: "bad" stands out."""

    cells: tuple[str, ...]
    name: str = ""


def event_table(events: Sequence[Event]) -> Markup:
    """Every event; saves without another event between them are one row."""
    begin, rows, num_starts = events[0].time, list[Row](), 0
    lost = [duration(restart.lost) for restart in restarts(events)]
    for is_save, group in groupby(events, key=lambda event: event.kind == "save" and not event.failed):
        together = list(group)
        if is_save and len(together) > 1:
            rows.append(_saves(together, begin))
            continue
        for event in together:
            more = _more(event)
            if event.kind in STARTS:
                more = f"{lost[num_starts - 1]} lost; {more}" if num_starts else more
                num_starts += 1
            rows.append(_row(event, begin, more))
    header = ("time (UTC)", "after", "event", "step", "reason", "more")
    rows = _shortened(rows)
    return table(header, [row.cells for row in rows], words=len(header), classes=[row.name for row in rows])


def _row(event: Event, begin: float | None, more: str) -> Row:
    kind = "save failed" if event.failed else event.kind
    cells = (_clock(event.time), _since(begin, event.time), kind, f"{event.step:,}", event.reason[:WORDS], more)
    return Row(cells, "bad" if SIGNS[sign_of(event)].tone == "bad" else "")


def _saves(saves: Sequence[Event], begin: float | None) -> Row:
    first, last = saves[0], saves[-1]
    steps = f"{first.step:,} to {last.step:,}"
    return Row((_clock(last.time), _since(begin, last.time), f"{len(saves):,} saves", steps, last.reason[:WORDS], ""))


def _shortened(rows: list[Row]) -> list[Row]:
    """The first and the last ones, and how many of which kind are between them."""
    half = ROWS // 2
    between = rows[half:-half]
    if len(rows) <= ROWS:
        return rows
    kinds = Counter(row.cells[2] for row in between).most_common(6)
    told = ", ".join(f"{count:,} × {kind}" for kind, count in kinds)
    gap = Row(("", "", f"{len(between):,} rows", "", f"left out here; events.jsonl has them: {told}", ""))
    return [*rows[:half], gap, *rows[-half:]]


def _clock(time: float | None) -> str:
    return "–" if time is None else datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _since(begin: float | None, time: float | None) -> str:
    return "–" if begin is None or time is None else duration(max(0.0, time - begin))


def _more(event: Event) -> str:
    """What else an event tells, in short."""
    said = ", ".join(f"{key}: {plain(value)}" for key, value in event.more.items())
    return said if len(said) <= WORDS else said[:WORDS] + " …"
