"""Plots of a plan as inline SVG, without scripts: colours come from the page's style, and hovering names every mark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megadit.page.axes import LETTER, WIDTH, Scale, drawing, log_ticks, text, tick_label, ticks, titled
from megadit.page.markup import Markup, quantity, tag
from megadit.planning.memory import Memory
from megadit.planning.plan import Plan, RankPlan
from megadit.planning.schedule import Action, Span
from megadit.planning.search import Candidate

ROW, BAR = 30.0, 22.0  # height of a rank's row, and of what is drawn in it
AXIS = 26.0  # below the rows
MAX_HOVER = 6000  # spans that have a hover text each; more make a page slow

# What stays from step to step, in blues; then what comes and goes.
CATEGORIES = {
    "weights": "the parameters",
    "masters": "their float32 masters",
    "moments": "AdamW's moments",
    "ema": "the moving average",
    "buffers": "what pipeline neighbours send",
    "gradients": "summed over the microbatches",
    "activations": "of all microbatches in flight",
    "updating": "gradients, and copies of them, while the engine reduces and updates",
}
ACTIONS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, gradient of the input",
    "W": "backward, gradients of the weights",
    "update": "reduction and update",
}


def _axis(scale: Scale, unit: str, top: float, bottom: float) -> Iterator[Markup]:
    """Grid lines from `top` to `bottom`, with numbers below."""
    for value in ticks(scale.high):
        x = scale(value)
        yield tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")
        yield text(x, bottom + 18, tick_label(value, unit), class_="tick", text_anchor="middle")


def _row_labels(labels: Sequence[str]) -> Iterator[Markup]:
    for place, label in enumerate(labels):
        yield text(0.0, place * ROW + ROW / 2 + 4, label, class_="label")


def _margin(labels: Iterable[str]) -> float:
    return 14 + LETTER * max(map(len, labels))


def layers_of(rank: RankPlan) -> str:
    """The layers of a pipeline rank's stages, as "0–4, 19–22"."""
    return ", ".join(f"{stage.start}–{stage.stop - 1}" if len(stage) > 1 else str(stage.start) for stage in rank.layers)


# Memory


def stack(memory: Memory) -> list[tuple[str, int]]:
    """(category, bytes) that make up the peak, which is in the backward passes or in the update."""
    state = ["weights", "masters", "moments", "ema", "buffers"]
    training = memory.gradients + memory.activations >= memory.updating
    names = state + (["gradients", "activations"] if training else ["updating"])
    return [(name, getattr(memory, name)) for name in names]


def memory_chart(plan: Plan) -> Markup:
    """A bar for each pipeline rank, stacked by category, and a line at the GPU's memory.

    Where the model is so small that nothing would be seen, the line is left out.
    """
    labels = [f"rank {rank.rank}" for rank in plan.ranks]
    capacity = plan.gpu.memory_bytes
    shows_capacity = plan.peak * 20 > capacity
    high = max(plan.peak, capacity) if shows_capacity else plan.peak
    scale = Scale(0, float(high), _margin(labels), WIDTH - 84)
    top, bottom = 20.0, 20 + ROW * len(plan.ranks)
    marks = [*_axis(scale, "B", top, bottom)]
    bars = [*_row_labels(labels)]
    for place, rank in enumerate(plan.ranks):
        bars += _memory_bar(rank, place * ROW + (ROW - BAR) / 2, scale)
    marks.append(tag("g", *bars, transform=f"translate(0 {top:.0f})"))
    if shows_capacity:
        x = scale(capacity)
        marks += [
            titled("line", "the memory of one GPU", x1=x, x2=x, y1=top - 4, y2=bottom, class_="limit"),
            text(x, 12.0, f"{plan.gpu.name}: {quantity(capacity, 'B')}", class_="limit-label", text_anchor="middle"),
        ]
    return drawing(bottom + AXIS, "Bytes on a GPU of each pipeline rank, by category", *marks)


def _memory_bar(rank: RankPlan, y: float, scale: Scale) -> Iterator[Markup]:
    at = 0
    for name, nbytes in stack(rank.memory):
        x, width = scale(at), scale(at + nbytes) - scale(at)
        at += nbytes
        if width <= 0:
            continue
        title = f"rank {rank.rank}, {name} ({CATEGORIES[name]}): {quantity(nbytes, 'B')}"
        seam = 1 if width > 3 else 0
        yield titled("rect", title, x=x, y=y, width=width - seam, height=BAR, rx=2, class_=f"fill-{name}")
        said = quantity(nbytes, "B")
        if width > LETTER * len(said) + 8:
            yield text(x + width / 2, y + 15, said, class_=f"on-{name}", text_anchor="middle")
    yield text(scale(at) + 6, y + 15, quantity(at, "B"), class_="value")


# Time


def timeline_chart(plan: Plan) -> Markup:
    """What each pipeline rank does when, then the reduction and the update; where nothing is drawn, it waits."""
    labels = [f"rank {rank.rank}" for rank in plan.ranks]
    end = plan.timeline.total + plan.update_seconds
    scale = Scale(0, end, _margin(labels), WIDTH - 24)
    bottom = ROW * len(plan.ranks)
    marks = [*_axis(scale, "s", 0.0, bottom), *_row_labels(labels)]
    ran = plan.timeline.ranks
    draw = _spans if sum(map(len, ran)) <= MAX_HOVER else _paths
    for place, (rank, spans) in enumerate(zip(plan.ranks, ran, strict=True)):
        y = place * ROW + (ROW - BAR) / 2
        marks.append(
            tag("rect", x=scale(0), y=y, width=scale(plan.timeline.total) - scale(0), height=BAR, class_="idle")
        )
        marks += draw(rank.rank, spans, y, scale)
        begin, seconds = plan.timeline.total, rank.update_seconds
        marks.append(
            titled(
                "rect",
                f"rank {rank.rank}, {ACTIONS['update']}: {quantity(seconds, 's')}",
                x=scale(begin),
                y=y,
                width=max(scale(begin + seconds) - scale(begin), 0.5),
                height=BAR,
                class_="fill-update",
            )
        )
    return drawing(bottom + AXIS, "The schedule of one step on each pipeline rank", *marks)


def _chunks(spans: Sequence[Span]) -> dict[int, int]:
    """Which of the rank's stages each stage is, from 0."""
    return {stage: place for place, stage in enumerate(sorted({span.action.stage for span in spans}))}


def _spans(rank: int, spans: Sequence[Span], y: float, scale: Scale) -> Iterator[Markup]:
    """A mark with a hover text for every action; the microbatch is written where there is room."""
    chunks = _chunks(spans)
    for action, begin, end in spans:
        x, width = scale(begin), scale(end) - scale(begin)
        chunk = chunks[action.stage]
        seam = 0.6 if width > 2.5 else 0.0
        yield titled(
            "rect",
            _action_title(rank, action, begin, end),
            x=x,
            y=y,
            width=width - seam,
            height=BAR,
            class_=f"fill-{action.kind}",
            **({"fill_opacity": _opacity(chunk)} if chunk else {}),
        )
        if width > LETTER * len(str(action.microbatch)) + 4:
            ink = "value" if chunk else f"on-{action.kind}"
            yield text(x + width / 2, y + 15, str(action.microbatch), class_=f"small {ink}", text_anchor="middle")


def _action_title(rank: int, action: Action, begin: float, end: float) -> str:
    return (
        f"rank {rank}, stage {action.stage}, microbatch {action.microbatch}: {ACTIONS[action.kind]}\n"
        f"{quantity(begin, 's')} to {quantity(end, 's')}: {quantity(end - begin, 's')}"
    )


def _opacity(chunk: int) -> float:
    """Further stages of a rank are paler."""
    return max(0.25, 0.6**chunk)


def _paths(rank: int, spans: Sequence[Span], y: float, scale: Scale) -> Iterator[Markup]:
    """One mark for all actions of a kind, without hover texts: a tenth of the size."""
    chunks = _chunks(spans)
    drawn: dict[tuple[str, int], list[str]] = {}
    for action, begin, end in spans:
        x, width = scale(begin), scale(end) - scale(begin)
        drawn.setdefault((action.kind, chunks[action.stage]), []).append(
            f"M{x:.2f} {y:.1f}h{width:.2f}v{BAR}h-{width:.2f}z"
        )
    for (kind, chunk), parts in drawn.items():
        yield tag("path", d="".join(parts), class_=f"fill-{kind}", fill_opacity=_opacity(chunk))


def terms_chart(terms: dict[str, float]) -> Markup:
    """The seconds of a step as one bar; colours are those of `term_class`."""
    scale = Scale(0, sum(terms.values()), 0.0, WIDTH)
    at, marks = 0.0, []
    for place, (name, seconds) in enumerate(terms.items()):
        x, width = scale(at), scale(at + seconds) - scale(at)
        at += seconds
        if width <= 0:
            continue
        title = f"{name}: {quantity(seconds, 's')}"
        marks.append(
            titled("rect", title, x=x, y=0, width=max(width - 1, 0.5), height=34, rx=2, class_=f"fill-term{place}")
        )
        if width > LETTER * len(title) + 8:
            marks.append(text(x + width / 2, 21.0, title, class_=f"on-term{place}", text_anchor="middle"))
    return drawing(34.0, "What the seconds of a step are made of", *marks)


# Search


def pareto_front(found: Sequence[Candidate]) -> list[Candidate]:
    """Of the layouts that have a plan, fitting or not, those to which no other is better in both memory and time."""
    planned = sorted(
        (candidate for candidate in found if candidate.plan is not None),
        key=lambda candidate: (peak_of(candidate), seconds_of(candidate)),
    )
    front: list[Candidate] = []
    for candidate in planned:
        if not front or seconds_of(candidate) < seconds_of(front[-1]):
            front.append(candidate)
    return front


def peak_of(candidate: Candidate) -> int:
    assert candidate.plan is not None
    return candidate.plan.peak


def seconds_of(candidate: Candidate) -> float:
    assert candidate.plan is not None
    return candidate.plan.seconds


def pareto_chart(plan: Plan, found: Sequence[Candidate]) -> Markup:
    """Peak memory against seconds of a step for all layouts that have a plan, on logarithmic axes.

    `found` has the fastest that fits first.
    """
    planned = [candidate for candidate in found if candidate.plan is not None]
    front, height = pareto_front(planned), 420.0
    x, y = _pareto_scales(plan, planned, height)
    marks = [*_pareto_axes(x, y)]
    capacity = plan.gpu.memory_bytes
    if x.low <= capacity <= x.high:
        at = x(capacity)
        marks += [
            tag("line", x1=at, x2=at, y1=y.last, y2=y.first, class_="limit"),
            text(
                at - 6,
                y.last + 12,
                f"{plan.gpu.name}: {quantity(capacity, 'B')}",
                class_="limit-label",
                text_anchor="end",
            ),
        ]
    # What fits is drawn last, above the rest.
    for candidate in sorted(planned, key=lambda candidate: not candidate.reason):
        marks.append(_point(candidate, x, y))
    corners = [(x(peak_of(candidate)), y(seconds_of(candidate))) for candidate in front]
    marks.append(tag("path", d=_steps(corners), class_="front"))
    marks += [tag("circle", cx=cx, cy=cy, r=6.5, class_="front") for cx, cy in corners]
    fitting = [candidate for candidate in planned if not candidate.reason]
    if fitting:
        marks += _best_label(fitting[0], x, y)
    return drawing(height, "Peak memory against seconds of a step, of every layout", *marks)


def _pareto_scales(plan: Plan, planned: Sequence[Candidate], height: float) -> tuple[Scale, Scale]:
    """For x and y. The GPU's memory is among the peaks when it is not far from all of them."""
    peaks, seconds = [peak_of(c) for c in planned], [seconds_of(c) for c in planned]
    if max(peaks) * 20 > plan.gpu.memory_bytes:
        peaks.append(plan.gpu.memory_bytes)
    return (
        Scale(min(peaks) / 1.15, max(peaks) * 1.15, 70.0, WIDTH - 16, is_log=True),
        Scale(min(seconds) / 1.25, max(seconds) * 1.15, height - 48, 8.0, is_log=True),
    )


def _pareto_axes(x: Scale, y: Scale) -> Iterator[Markup]:
    for value in log_ticks(x.low, x.high):
        at = x(value)
        yield tag("line", x1=at, x2=at, y1=y.last, y2=y.first, class_="grid")
        yield text(at, y.first + 18, tick_label(value, "B"), class_="tick", text_anchor="middle")
    for value in log_ticks(y.low, y.high):
        at = y(value)
        yield tag("line", x1=x.first, x2=x.last, y1=at, y2=at, class_="grid")
        yield text(x.first - 8, at + 4, tick_label(value, "s"), class_="tick", text_anchor="end")
    yield text((x.first + x.last) / 2, y.first + 40, "most bytes on a GPU", class_="label", text_anchor="middle")
    middle = (y.first + y.last) / 2
    turned = f"rotate(-90 12 {middle:.0f})"
    yield text(12.0, middle, "seconds of a step", class_="label", text_anchor="middle", transform=turned)


def _point(candidate: Candidate, x: Scale, y: Scale) -> Markup:
    assert candidate.plan is not None
    return titled(
        "circle",
        f"{candidate}\n{quantity(candidate.plan.seconds, 's')}, MFU {candidate.plan.mfu:.1%}, "
        f"{quantity(candidate.plan.peak, 'B')}{': ' + candidate.reason if candidate.reason else ''}",
        cx=x(peak_of(candidate)),
        cy=y(seconds_of(candidate)),
        r=4.0,
        class_="refused" if candidate.reason else "fits",
    )


def _steps(corners: Sequence[tuple[float, float]]) -> str:
    """A staircase: with so much memory no layout is faster than the corner before."""
    (x, y), *others = corners
    return f"M{x:.2f} {y:.2f}" + "".join(f"H{x:.2f}V{y:.2f}" for x, y in others)


def _best_label(best: Candidate, x: Scale, y: Scale) -> Iterator[Markup]:
    """Below the point, and on the side on which there is room."""
    cx, cy = x(peak_of(best)), y(seconds_of(best))
    said = f"fastest that fits: {quantity(seconds_of(best), 's')}"
    is_left = cx > x.last - LETTER * len(said)
    yield tag("circle", cx=cx, cy=cy, r=9.5, class_="best")
    yield text(cx + (4 if is_left else -4), cy + 24, said, class_="value", text_anchor="end" if is_left else "start")
