"""One or several runs as one HTML page that loads nothing: what became of them, their curves, their events.

All that is told comes from the runs' own files, and is escaped. The page's only script shows numbers under the pointer;
the page's policy lets no other run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from megadit.history.charts import (
    HALF,
    WIDE,
    Lane,
    Series,
    Size,
    curves_chart,
    load_chart,
    load_columns,
    series_legend,
    sign_legend,
)
from megadit.history.chronicle import event_table
from megadit.history.comparison import differences, figures, flat
from megadit.history.curve import Curve
from megadit.history.look import COLOURS, HEAT, LEVELS, RULES, SCRIPT, sign_of
from megadit.history.outcome import duration, num_starts, restarts, verdict
from megadit.history.story import ROUTING, Story
from megadit.history.told import Told, labels, last_of, letter, said
from megadit.page.markup import Markup, join, tag
from megadit.page.parts import legend, note, page, section, tiles
from megadit.page.style import style_sheet


class Shown(NamedTuple):
    """How a curve of the metrics is shown. log_over: between which values the axis is logarithmic, as their ratio."""

    name: str
    title: str
    size: Size
    log_over: float


GRADIENT = Shown("grad_norm", "Norm of the gradient, before clipping", WIDE, 8.0)
CURVES = (
    Shown("lr", "Learning rate", HALF, math.inf),
    Shown("seconds", "Seconds of a step", HALF, 20.0),
    Shown("images_per_second", "Images per second", HALF, 20.0),
    Shown("tflops_per_gpu", "TFLOP/s of each GPU", HALF, 20.0),
    Shown("peak_memory_gb", "Peak memory of process 0, GB", HALF, math.inf),
)
STATISTICS = {
    "entropy": "Entropy of a token's affinities; 1: all experts alike",
    "unpicked": "Part of the tokens that no expert takes",
    "busiest": "Most experts that take one token",
    "picks": "Experts that take a token, on average",
}


def report(stories: Sequence[Story], now: float) -> str:
    """The page. `now`: seconds since 1970."""
    alone = len(stories) == 1
    runs = [
        Told(story, label, "" if alone else letter(place), place)
        for place, (story, label) in enumerate(zip(stories, labels(stories), strict=True))
    ]
    last = max(story.last_step for story in stories)
    last = last or max((event.step for story in stories for event in story.events), default=0)
    title = runs[0].label if alone else f"{len(runs)} runs"
    drawn = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts: list[str] = [tag("h1", title), tag("p", f"{_where(stories)} · drawn {drawn}", class_="sub")]
    parts.append(_verdicts(runs, now))
    parts += [_tiles(stories[0])] if alone else [figures(runs, now), *differences(runs)]
    if last:
        parts += [_losses(runs, last), *_gradient(runs, last), *_machine(runs, last), *_routing(runs, last)]
    parts += [*_loads(runs, last), *_events(runs)]
    if alone and stories[0].config:
        parts.append(section("configuration", "Configuration", tag("pre", _flat_text(stories[0].config))))
    parts.append(tag("footer", "Made by megadit, tools/report.py, from the runs' own files."))
    return page(
        f"{title}: report", style_sheet(COLOURS, RULES), join(tag("main", *parts), tag("script", Markup(SCRIPT))),
        policy=_policy(),
    )  # fmt: skip


def _policy() -> str:
    """What a browser may do with the page: load nothing, and run the one script."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'"


def _where(stories: Sequence[Story]) -> str:
    folders = [str(story.folder) for story in stories]
    return folders[0] if len(folders) == 1 else f"{folders[0]} and {len(folders) - 1:,} more"


# The head of the page


def _verdicts(runs: Sequence[Told], now: float) -> Markup:
    made = []
    for run in runs:
        found = verdict(run.story, now)
        mark = join(run.mark, " ", run.label, " · ") if run.mark else ""
        made.append(tag("div", tag("p", mark, str(found), class_=f"verdict {'good' if found.is_good else 'bad'}")))
        made += [note(" ".join((run.mark, text)) if run.mark else text) for text in run.story.notes]
    return tag("div", *made, class_="verdicts")


def _tiles(story: Story) -> Markup:
    loss, heldout = story.curve("loss"), story.curve("heldout_loss")
    planned, seconds = story.planned, story.curve("seconds").median()
    lost = restarts(story.events)
    part = (
        f"{math.floor(1000 * story.last_step / planned) / 1000:.1%} of {planned:,}"
        if planned
        else "it is not known of how many"
    )
    left = (planned or 0) - story.last_step
    ahead = f"{duration(left * seconds)} for the {left:,} that are left" if left > 0 and seconds < 1e9 else "the median"
    failed = sum(event.failed for event in story.events)
    memory = story.curve("peak_memory_gb").finite
    made = [
        ("steps done", f"{story.last_step:,}", part),
        ("last loss", last_of(loss), f"{said(loss.recent())}: the median of the last 100"),
    ]
    if len(heldout):
        best = heldout.finite.min(initial=math.inf)
        made.append(("held-out loss", last_of(heldout), f"{said(best)}: the least"))
    made += [
        ("step", said(seconds, " s"), ahead),
        (
            "throughput",
            said(story.curve("images_per_second").median(), " images/s"),
            f"{said(story.curve('tflops_per_gpu').median())} TFLOP/s of each GPU, the median",
        ),
    ]
    if len(memory):
        made.append(("peak memory", said(memory.max(), " GB"), "of process 0"))
    if story.events:
        total = sum(restart.lost for restart in lost)
        made.append(("starts", f"{num_starts(story):,}", f"{_count(len(lost), 'restart')} of a run that had begun"))
        made.append(("lost to restarts", duration(total), "wall time whose work did not stay"))
    made.append(("steps left out", f"{len(story.skipped):,}", "without finite numbers"))
    if failed:
        made.append(("saves that failed", f"{failed:,}", "see the events"))
    return tiles(made)


def _count(count: int, noun: str) -> str:
    """
    >>> _count(1, "restart"), _count(2, "restart")
    ('1 restart', '2 restarts')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# Curves


def _lanes(runs: Sequence[Told], size: Size) -> list[Lane]:
    """The events of each run; small plots have no room for saves, nor for several runs'."""
    if size is WIDE:
        return [Lane(run.mark, run.story.events) for run in runs if run.story.events]
    events = [event for event in runs[0].story.events if sign_of(event) != "save"]
    return [Lane("", events)] if len(runs) == 1 and events else []


def _titled(title: str, chart: Markup) -> Markup:
    return tag("div", tag("h3", title), chart)


def _signs(runs: Sequence[Told]) -> list[Markup]:
    events = [event for run in runs for event in run.story.events]
    return [sign_legend(events)] if events else []


def _losses(runs: Sequence[Told], last: int) -> Markup:
    several = bool(runs[0].mark)
    series = [run.series(run.story.curve("loss"), "" if several else "training") for run in runs]
    heldout = [
        run.series(curve, "held out (EMA)", dotted=True)
        for run in runs
        if len(curve := run.story.curve("heldout_loss"))
    ]
    # Without marks at their ends, which the training's have; of a single run in another colour.
    heldout = [replace(each, mark="", place=each.place + (not several)) for each in heldout]
    chart = curves_chart("Loss by step", [*series, *heldout], _lanes(runs, WIDE), last, WIDE, log_over=2.5)
    told = (
        "A line is the median of some steps, the band around it reaches from their least to their greatest value. "
        "A cross at the top is a value that is not finite."
    )
    return section("loss", "Loss", note(told), series_legend([*series, *heldout]), chart, *_signs(runs))


def _chart(runs: Sequence[Told], curve: Shown, last: int) -> Markup | None:
    """A curve of all runs that have it."""
    name, title, size, log_over = curve
    series = [run.series(found, "" if run.mark else name) for run in runs if len(found := run.story.curve(name))]
    if not series:
        return None
    return curves_chart(f"{title}, by step", series, _lanes(runs, size), last, size, log_over)


def _gradient(runs: Sequence[Told], last: int) -> list[Markup]:
    chart = _chart(runs, GRADIENT, last)
    return [section("gradient", GRADIENT.title, chart)] if chart else []


def _machine(runs: Sequence[Told], last: int) -> list[Markup]:
    charts = [_titled(curve.title, chart) for curve in CURVES if (chart := _chart(runs, curve, last))]
    return [section("speed", "Learning rate, speed, memory", tag("div", *charts, class_="pair"))] if charts else []


def _routing(runs: Sequence[Told], last: int) -> list[Markup]:
    """Of one run every layer; of several the mean over their layers."""
    alone = not runs[0].mark
    charts: list[Markup] = []
    legend_of: list[Series] = []
    for name in ROUTING:
        if alone:
            layers = runs[0].story.routing.get(name, {})
            series = [
                Series(f"layer {layer}", layer[:8], curve, place) for place, (layer, curve) in enumerate(layers.items())
            ]
        else:
            found = [(run, run.story.routing[name]) for run in runs if name in run.story.routing]
            series = [run.series(_mean(list(layers.values()))) for run, layers in found]
        if series:
            legend_of = legend_of or series
            chart = curves_chart(f"{STATISTICS[name]}, by step", series, (), last, HALF)
            charts.append(_titled(STATISTICS[name], chart))
    if not charts:
        return []
    told = "Of each layer with experts; numbers are layers." if alone else "Means over the layers with experts."
    parts = [note(told), series_legend(legend_of), tag("div", *charts, class_="pair")]
    return [section("routing", "Routing", *parts)]


def _mean(curves: Sequence[Curve]) -> Curve:
    """The mean of curves over the steps that all of them have."""
    if any(len(curve) != len(curves[0]) or (curve.steps != curves[0].steps).any() for curve in curves):
        return curves[0]
    return Curve.of(curves[0].steps, sum(curve.values for curve in curves) / len(curves))


def _loads(runs: Sequence[Told], last: int) -> list[Markup]:
    found = [(run, layer, loads) for run in runs for layer, loads in run.story.loads.items()]
    if not found:
        return []
    columns = load_columns([loads for _, _, loads in found])
    charts = [
        _titled(" ".join(filter(None, (run.mark, f"layer {layer}"))), load_chart(layer, loads, columns, last))
        for run, layer, loads in found
    ]
    bounds = [f"{bound:g}" for bound in LEVELS]
    told = [f"below {bounds[0]}"] + [f"{a} to {b}" for a, b in zip(bounds, bounds[1:], strict=False)]
    told.append(f"{bounds[-1]} and more")
    keys = legend((f"fill-{name}", text) for name, text in zip(HEAT, told, strict=True))
    text = "Tokens that each expert took, in units of the mean expert's; experts from top to bottom, means over steps."
    return [section("load", "Load of the experts", note(text), keys, tag("div", *charts, class_="pair"))]


def _events(runs: Sequence[Told]) -> list[Markup]:
    return [
        section(
            f"events{run.mark and '-' + run.mark}",
            f"Events of {run.mark} {run.label}" if run.mark else "Events",
            event_table(run.story.events),
        )
        for run in runs
        if run.story.events
    ]


def _flat_text(config: Mapping[str, object]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in flat(config).items())


def write_report(path: Path, stories: Sequence[Story], now: float) -> None:
    """The page as a file, whole or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    content = report(stories, now).encode("utf-8", "replace")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
