"""Plots of runs as inline SVG: curves with their bands, events on the axis of steps, loads of experts.

A curve's path has `data-name`, a drawing `data-x` and `data-y`, its scales: from them the page's script reads
numbers back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megadit.history.curve import Curve, Loads, Thinned, thin
from megadit.history.look import DASHES, LEVELS, SERIES, SIGNS, sign_of
from megadit.history.story import Event
from megadit.page.axes import LETTER, WIDTH, Scale, drawing, spread_ticks, text, titled
from megadit.page.markup import Markup, join, tag

LANE, GAP = 15.0, 5.0  # height of a run's events, and their distance from the axis
DOTS = 40  # of a curve of few values
TOLD = 6  # events that a mark for several of them names
CELLS = 24_000  # of heat maps on a page


@dataclass(frozen=True)
class Size:
    """Of a plot without its lanes. columns: of a curve, which has three numbers in each."""

    width: float
    height: float
    columns: int
    ticks: int


WIDE, HALF = Size(WIDTH, 260.0, 600, 8), Size(470.0, 170.0, 300, 4)
LEFT, TOP, BELOW = 58.0, 12.0, 24.0  # for numbers, for marks of what is not finite, for steps


@dataclass(frozen=True)
class Series:
    """A curve and how it is told from others. mark: written at its end. dotted: few values, each of which is shown."""

    label: str
    mark: str
    curve: Curve
    place: int
    dotted: bool = False

    @property
    def colour(self) -> str:
        return f"s{self.place % len(SERIES)}"

    @property
    def dash(self) -> str:
        """So that colours that come again have another dash."""
        return f"d{(self.place + self.place // len(SERIES)) % len(DASHES)}"


@dataclass(frozen=True)
class Lane:
    """The events of a run. mark: that of its curves."""

    mark: str
    events: Sequence[Event]


def step_scale(last: int, size: Size, marks: Iterable[str]) -> Scale:
    """The axis of steps, with room for the marks at the ends of curves."""
    right = max((12 + (LETTER + 1) * len(mark) for mark in marks if mark), default=18.0)
    return Scale(0, float(max(last, 1)), LEFT, size.width - right)


def value_scale(thinned: Sequence[Thinned], size: Size, log_over: float) -> Scale | None:
    """For all that is finite; logarithmic where the greatest is more than `log_over` times the least. None: nothing."""
    lows = [np.nanmin(thin.low) for thin in thinned if np.isfinite(thin.low).any()]
    highs = [np.nanmax(thin.high) for thin in thinned if np.isfinite(thin.high).any()]
    if not lows:
        return None
    low, high, bottom = float(min(lows)), float(max(highs)), size.height - 1
    if low > 1e-90 and high / low > log_over:
        return Scale(low / (high / low) ** 0.04, high * (high / low) ** 0.04, bottom, TOP, is_log=True)
    room = 0.06 * (high - low)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = 0.25 * max(abs(low), abs(high)) if max(abs(low), abs(high)) > 1e-90 else 1.0
        low = min(low, 0.0) if high > 0 else low
    # Down to zero where that is near: a flat curve should look flat.
    bound = 0.0 if 0 <= low < 0.5 * high else low - room
    return Scale(bound, high + room, bottom, TOP)


def curves_chart(
    title: str, series: Sequence[Series], lanes: Sequence[Lane], last: int, size: Size, log_over: float = math.inf
) -> Markup:
    """Curves over steps up to `last`, each as its median in a band from least to greatest, and the events below."""
    series = [each for each in series if len(each.curve)]
    thinned = [thin(each.curve, size.columns) for each in series]
    x, y = step_scale(last, size, (each.mark for each in series)), value_scale(thinned, size, log_over)
    marks: list[Markup] = []
    if y is not None:
        marks += _values(x, y)
    bottom = size.height + (GAP + LANE * len(lanes) if lanes else 0.0)
    marks += _steps(x, size, bottom)
    for place, lane in enumerate(lanes):
        marks += _lane(lane, x, size.height + GAP + LANE * (place + 0.5), size.height, crosses=len(lanes) == 1)
    if y is not None:
        for each, columns in zip(series, thinned, strict=True):
            if not each.dotted:
                marks += _band(each, columns, x, y)
        for each, columns in zip(series, thinned, strict=True):
            marks += _line(each, columns, x, y)
        marks += _ends(series, thinned, x, y)
    for each, columns in zip(series, thinned, strict=True):
        marks += _bad(each, columns, x)
    told = {"data_x": _told(x), "data_y": _told(y)} if y is not None else {}
    return drawing(bottom + BELOW, title, *marks, width=size.width, **told)


def _told(scale: Scale) -> str:
    ends = f"{scale.low!r} {scale.high!r} {scale.first:.2f} {scale.last:.2f}"
    return f"{ends} {int(scale.is_log)}"


def number(value: float) -> str:
    """A number to four digits.

    >>> number(0.41237), number(12345.6), number(1.5e-4), number(float("nan"))
    ('0.4124', '12,346', '0.00015', 'nan')
    """
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _values(x: Scale, y: Scale) -> Iterator[Markup]:
    for value in spread_ticks(y, 5):
        at = y(value)
        if TOP - 1 <= at <= y.first + 1:
            yield tag("line", x1=x.first, x2=x.last, y1=at, y2=at, class_="grid")
            yield text(x.first - 8, at + 4, f"{value:,.0f}" if 1e4 <= value < 1e9 else f"{value:.6g}", class_="tick",
                       text_anchor="end")  # fmt: skip


def _steps(x: Scale, size: Size, bottom: float) -> Iterator[Markup]:
    yield tag("line", x1=x.first, x2=x.last, y1=size.height, y2=size.height, class_="axis")
    for value in spread_ticks(x, size.ticks):
        if value == int(value):
            at = x(value)
            yield tag("line", x1=at, x2=at, y1=size.height, y2=size.height + 4, class_="axis")
            yield text(at, bottom + 16, f"{value:,.0f}", class_="tick", text_anchor="middle")


def _path(xs: Iterable[float], ys: Iterable[float]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.2f}" for x, y in zip(xs, ys, strict=True))


def _band(series: Series, columns: Thinned, x: Scale, y: Scale) -> Iterator[Markup]:
    """From the least to the greatest value of every column, where they differ."""
    parts = []
    for piece in columns.pieces():
        low, high, steps = columns.low[piece], columns.high[piece], columns.steps[piece]
        if (low < high).any():
            xs = [x(step) for step in steps]
            ys = [y(value) for value in high]
            xs, ys = xs + xs[::-1], ys + [y(value) for value in low[::-1]]
            parts.append(_path(xs, ys) + "z")
    if parts:
        yield tag("path", d="".join(parts), class_=f"band fill-{series.colour}")


def _line(series: Series, columns: Thinned, x: Scale, y: Scale) -> Iterator[Markup]:
    parts, dots = [], []
    for piece in columns.pieces():
        points = [(x(step), y(value)) for step, value in zip(columns.steps[piece], columns.middle[piece], strict=True)]
        dots += points if series.dotted or len(points) == 1 else []
        # A point alone is a line to itself, which the script finds too.
        parts.append(_path(*zip(*(points if len(points) > 1 else points * 2), strict=True)))
    if parts:
        yield tag(
            "path",
            d="".join(parts),
            class_=f"line{' few' * series.dotted} {series.colour} {series.dash}",
            data_name=series.label,
        )
    for cx, cy in dots[:: math.ceil(len(dots) / DOTS) or 1]:
        yield tag("circle", cx=cx, cy=cy, r=3.2, class_=f"dot fill-{series.colour}")


def _ends(series: Sequence[Series], thinned: Sequence[Thinned], x: Scale, y: Scale) -> Iterator[Markup]:
    """Marks beside the last values, moved apart where they would cover one another."""
    places = []
    for each, columns in zip(series, thinned, strict=True):
        finite = np.flatnonzero(np.isfinite(columns.middle))
        if each.mark and len(finite):
            places.append((y(columns.middle[finite[-1]]), x(columns.steps[finite[-1]]), each))
    written: list[tuple[float, float]] = []
    for at, end, each in sorted(places, key=lambda place: place[0]):
        taken = sorted(y for x, y in written if abs(x - end) < 6 + LETTER * len(each.mark))
        free = at
        for other in taken:  # from top to bottom
            if abs(free - other) < 12:
                free = other + 12
        written.append((end, free))
        yield text(end + 5, free + 4, each.mark, class_=f"mark fill-{each.colour}")


def _bad(series: Series, columns: Thinned, x: Scale) -> Iterator[Markup]:
    for step, count, value in columns.bad:
        said = f"{series.label}: {value} at step {step:,}" + (f", {count:,} such steps here" if count > 1 else "")
        yield titled("path", said, d="M-3 -3L3 3M-3 3L3 -3", transform=f"translate({x(step):.1f} 5)",
                     class_="shape bad-value ev-bad")  # fmt: skip


# Events


def _lane(lane: Lane, x: Scale, y: float, axis: float, crosses: bool) -> Iterator[Markup]:
    """The events of a run side by side below the axis; those that are near and alike are one mark."""
    if lane.mark:
        yield text(x.first - 8, y + 4, lane.mark, class_="tick mark", text_anchor="end")
    near: dict[tuple[str, int], list[Event]] = {}
    for event in sorted(lane.events, key=lambda event: event.step):
        near.setdefault((sign_of(event), int(_at(event, x) // 10)), []).append(event)
    free = -math.inf
    for (name, _), events in sorted(near.items(), key=lambda item: item[1][0].step):
        sign, at = SIGNS[name], _at(events[0], x)
        if crosses and sign.tone != "good":
            yield tag("line", x1=at, x2=at, y1=TOP, y2=axis, class_=f"when ev-{sign.tone}")
        # Beside the mark before; nothing is moved out of the drawing.
        free = place = min(max(at, free + 11), x.last + 4)
        yield titled("path", _said(events), d=sign.path, transform=f"translate({place:.1f} {y:.1f})",
                     class_=f"shape event ev-{sign.tone}" + (" hollow" if sign.is_hollow else ""))  # fmt: skip


def _at(event: Event, x: Scale) -> float:
    """What was told of a step that no curve has is at the end."""
    return x(min(event.step, x.high))


def _said(events: Sequence[Event]) -> str:
    said = [f"{event.kind}, step {event.step:,}: {event.reason[:300]}" for event in events[:TOLD]]
    return "\n".join(said + ([f"and {len(events) - TOLD:,} more"] if len(events) > TOLD else []))


def sign_legend(events: Iterable[Event]) -> Markup:
    """The signs of these events, with what they mean."""
    used = {sign_of(event) for event in events}
    entries = []
    for name, sign in SIGNS.items():
        if name in used:
            hollow = " hollow" if sign.is_hollow else ""
            icon = tag("svg", tag("path", d=sign.path, class_=f"shape ev-{sign.tone}{hollow}"), viewBox="-7 -7 14 14",
                       class_="icon", aria_hidden="true")  # fmt: skip
            entries.append(tag("span", icon, sign.means))
    return tag("p", *entries, class_="legend")


def series_legend(series: Iterable[Series]) -> Markup:
    """Colour, dash and mark of each."""
    entries = []
    for each in series:
        line = tag("line", x1=0, x2=30, y1=6, y2=6, class_=f"line{' few' * each.dotted} {each.colour} {each.dash}")
        dot = [tag("circle", cx=15, cy=6, r=3.2, class_=f"dot fill-{each.colour}")] if each.dotted else []
        key = tag("svg", line, *dot, viewBox="0 0 30 12", class_="key", aria_hidden="true")
        entries.append(tag("span", key, join(tag("b", each.mark), " ") if each.mark else "", each.label))
    return tag("p", *entries, class_="legend")


# Loads


def level(load: float) -> int:
    """The colour of a load, as a part of the mean one: 3 is the fair share.

    >>> [level(load) for load in (0.0, 0.6, 1.0, 3.0, 9.0)]
    [0, 2, 3, 5, 6]
    """
    return sum(load >= bound for bound in LEVELS)


def load_columns(loads: Sequence[Loads]) -> int:
    """Columns of each heat map, so that all of them together stay small."""
    return min(96, max(12, CELLS // max(1, sum(load.experts for load in loads))))


def load_chart(layer: str, loads: Loads, columns: int, last: int) -> Markup:
    """Experts from top to bottom, steps from left to right; the colour is the load."""
    size, row = HALF, max(2.0, min(14.0, 150 / loads.experts))
    x, bottom = step_scale(last, size, ()), row * loads.experts
    parts: dict[int, list[str]] = {}
    stretches = loads.means(columns)
    for expert in range(loads.experts):
        cells = [
            (begin, end, level(float(means[expert]))) for begin, end, means in stretches if np.isfinite(means[expert])
        ]
        for begin, end, shade in _joined(cells):
            left, right = x(begin), min(x(end), x.last)
            parts.setdefault(shade, []).append(f"M{left:.1f} {expert * row:.1f}H{right:.1f}v{row:.1f}H{left:.1f}z")
    marks = [tag("path", d="".join(part), class_=f"fill-heat{shade}") for shade, part in sorted(parts.items())]
    every = max(1, math.ceil(loads.experts / 8))
    for expert in range(0, loads.experts, every):
        marks.append(text(x.first - 8, (expert + 0.5) * row + 4, str(expert), class_="tick", text_anchor="end"))
    marks += _steps(x, Size(size.width, bottom, 0, size.ticks), bottom)
    return drawing(bottom + BELOW, f"Load of the experts of layer {layer}", *marks, width=size.width)


def _joined(cells: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Neighbours of one colour as one."""
    pending: tuple[int, int, int] | None = None
    for begin, end, shade in cells:
        if pending and pending[1] == begin and pending[2] == shade:
            pending = (pending[0], end, shade)
        else:
            if pending:
                yield pending
            pending = (begin, end, shade)
    if pending:
        yield pending
