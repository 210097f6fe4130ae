"""A plan as one HTML page with plots, readable on its own: no script, nothing is loaded, and it prints.

The page says what it rests on: the GPU's numbers, every assumption and the whole configuration are on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from megadit.model.count import Flops, Size, size_of
from megadit.page.markup import Markup, quantity, tag
from megadit.page.parts import legend, note, page, section, table, tiles
from megadit.page.style import style_sheet
from megadit.planning.charts import (
    ACTIONS,
    CATEGORIES,
    layers_of,
    memory_chart,
    pareto_chart,
    pareto_front,
    peak_of,
    stack,
    terms_chart,
    timeline_chart,
)
from megadit.planning.colours import COLOURS, RULES
from megadit.planning.hardware import Efficiency, Gpu
from megadit.planning.plan import SAMPLES, Plan
from megadit.planning.search import Candidate, does_not_fit
from megadit.planning.summary import days, flops, traffic, where

BEST, EXAMPLES = 15, 12  # layouts in the table of the fastest; reasons in that of the others

ASSUMPTIONS = (
    "Kernels run one after another. Each takes the longer of its matrix products and its memory traffic (a roofline), "
    "and a launch. They are those that torch dispatches for the model's own modules: nothing is fused, so run.compile "
    "is faster than this.",
    "Attention is one fused kernel that makes its scores again in the backward pass. Where torch has none for a shape, "
    "such as grouped queries with a mask on some GPUs, it is slower and keeps the scores.",
    "A collective takes a latency, and its bytes over the bandwidth of the slower of links and network. Computation "
    "waits for it; collectives do not slow one another down; switches do not reduce (no SHARP).",
    "Ranks fill one node after another, tensor ranks first, then expert, data and pipeline ranks.",
    "A pipeline transfer under 1f1b begins when both ranks are free; under interleaved and zbv it runs beside "
    "computation.",
    "Experts are full: all of them take their capacity, so all ranks of a pipeline rank compute the same.",
    "The update reads and writes gradients, parameters and optimizer state as often as torch's AdamW and DeepSpeed do, "
    "at the bandwidth of the memory; it begins when the slowest pipeline rank is done.",
    "Memory is an upper bound, for gradients and activations are taken at their most together. CUDA's context, NCCL's "
    "and cuBLAS's buffers and fragmentation are not in it: leave room (tools/plan.py --spare, by default 10%).",
    "Reading data, saving checkpoints, evaluation and sampling cost nothing. Frozen encoders are in the totals of "
    "parameters, and neither in memory nor in time: their states are made beforehand.",
    "MFU counts what the model needs, forward and backward, not what is run again, over the datasheet's dense rate.",
)


def report(plan: Plan, found: Sequence[Candidate]) -> str:
    """The page. `found`: what `search.search` gave for this plan's model and GPUs, the fastest first, or nothing."""
    size = size_of(plan.config.model, plan.config.text)
    name = plan.config.run.name
    body = tag(
        "main",
        tag("h1", f"{name} on {plan.world_size:,} × {plan.gpu.name}"),
        tag("p", _layout(plan), class_="sub"),
        _verdict(plan),
        _tiles(plan, size),
        _memory(plan),
        _timeline(plan),
        _terms(plan),
        _communication(plan),
        *([_search(plan, found)] if found else []),
        _model(plan, size),
        _grounds(plan),
        _configuration(plan),
        tag("footer", "Made by megadit, tools/plan.py. An estimate: docs/planning.md explains every term."),
    )
    return page(f"{name}: plan for {plan.world_size} × {plan.gpu.name}", style_sheet(COLOURS, RULES), body)


# The head of the page


def _layout(plan: Plan) -> str:
    layout, config = plan.layout, plan.config
    sequence = " with sequence" if config.parallel.sequence else ""
    return " · ".join(
        (
            f"tensor {layout.tp}{sequence}",
            f"pipeline {layout.pp} ({config.parallel.schedule})",
            f"expert {layout.ep}",
            f"data {layout.dp}",
            f"{plan.num_microbatches} microbatches of {plan.micro_batch} images",
            f"recompute {config.run.recompute}",
            f"ZeRO-{config.zero.stage}",
            config.run.dtype,
        )
    )


def _verdict(plan: Plan) -> Markup:
    reason = does_not_fit(plan, 0.0)
    if reason:
        return tag("p", f"Does not fit: {reason}", class_="verdict bad")
    memory = quantity(plan.gpu.memory_bytes, "B")
    return tag("p", f"Fits: {plan.headroom:.0%} of {memory} stay free on the fullest GPU", class_="verdict good")


def _tiles(plan: Plan, size: Size) -> Markup:
    made = (
        ("step", quantity(plan.seconds, "s"), f"of {plan.config.data.global_batch:,} images"),
        ("MFU", f"{plan.mfu:.1%}", f"{quantity(_rate(plan), 'FLOP/s')} on each GPU"),
        ("throughput", f"{plan.images_per_second:,.0f} images/s", f"on {plan.world_size:,} GPUs"),
        ("training", f"{days(plan):,.1f} days", f"for {number(SAMPLES)} samples"),
        ("cost", f"{days(plan) * 24 * plan.world_size:,.0f}", "GPU-hours for that training"),
        (
            "peak memory",
            quantity(plan.peak, "B"),
            f"of {quantity(plan.gpu.memory_bytes, 'B')}, {plan.headroom:.0%} free",
        ),
        ("parameters", number(size.total), f"{number(size.frozen.total)} of them frozen"),
        ("activated", number(size.activated), "parameters, for one token"),
    )
    return tiles(made)


def _rate(plan: Plan) -> float:
    """FLOP/s of the model on each GPU."""
    return plan.flops / plan.seconds / plan.world_size


def number(count: int) -> str:
    """A number of parameters.

    >>> number(97_138_000_000), number(81_500)
    ('97.14 billion', '81,500')
    """
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:,.2f} {name}"
    return f"{count:,}"


# Memory and time


def _memory(plan: Plan) -> Markup:
    shown = {name for rank in plan.ranks for name, _ in stack(rank.memory)}
    entries = [(f"fill-{name}", f"{name}: {told}") for name, told in CATEGORIES.items() if name in shown]
    names = [name for name in CATEGORIES if name != "updating"]
    rows = [
        (
            str(rank.rank),
            layers_of(rank),
            number(rank.parameters),
            *(quantity(getattr(rank.memory, name), "B") for name in (*names, "updating", "peak")),
        )
        for rank in plan.ranks
    ]
    return section(
        "memory",
        "Memory of a GPU",
        note(
            "On each pipeline rank; ranks that differ along other axes hold as much. The peak is the state and buffers "
            "with gradients and activations, or with what the update needs, whichever is more."
        ),
        legend(entries),
        memory_chart(plan),
        table(("rank", "layers", "parameters", *names, "updating", "peak"), rows, words=2),
    )


def _timeline(plan: Plan) -> Markup:
    kinds = {kind for kind, _ in plan.timeline.program.pairs} | {"update"}
    entries = [(f"fill-{kind}", told) for kind, told in ACTIONS.items() if kind in kinds] + [("idle", "waits")]
    notes = " Further stages of a rank are paler." if plan.config.parallel.stages_on_rank > 1 else ""
    if plan.gpu.cores:
        notes += " Drawn as if no rank shared its cores with others, which a step's seconds allow for."
    return section(
        "timeline",
        "Schedule of a step",
        note(
            f"{plan.config.parallel.schedule}, {plan.num_microbatches} microbatches of {plan.micro_batch} images on "
            f"each rank; a number is a microbatch.{notes} The busiest rank waits {plan.timeline.bubble:.1%} of the "
            f"forward and backward passes (the bubble); the mean rank has {plan.timeline.imbalance:.1%} less to do "
            "than that one, for stages are uneven."
        ),
        legend(entries),
        timeline_chart(plan),
    )


def _terms(plan: Plan) -> Markup:
    terms = plan.terms
    rows = [(name, quantity(seconds, "s"), f"{seconds / plan.seconds:.1%}") for name, seconds in terms.items()]
    rows.append(("total", quantity(plan.seconds, "s"), "100%"))
    rate = quantity(plan.gpu.rate(plan.config.run.dtype), "FLOP/s")
    return section(
        "seconds",
        "Seconds of a step",
        note("Of the pipeline rank that has most to do."),
        terms_chart(terms),
        legend((f"fill-term{place}", name) for place, name in enumerate(terms)),
        table(("part", "time", "share"), rows),
        tag("h3", "MFU"),
        note(
            f"{quantity(plan.flops, 'FLOP')} of the model in a step, over {quantity(plan.seconds, 's')} and "
            f"{plan.world_size:,} GPUs, are {quantity(_rate(plan), 'FLOP/s')} on each: {plan.mfu:.1%} of the {rate} of "
            f"{plan.config.run.dtype} in the datasheet."
        ),
    )


def _communication(plan: Plan) -> Markup:
    rows = []
    for (axis, operation), (count, nbytes) in sorted(traffic(plan).items()):
        size, per_node = plan.groups[axis]
        place = where(plan, axis) + ("" if plan.is_within_node(axis) else f", {per_node} on each")
        place = place if size > 1 else "one rank, nothing moves"
        rows.append(
            (axis, place, operation, f"{size:,}", f"{count:,}", quantity(nbytes / count, "B"), f"{nbytes / 1e9:,.3f}")
        )
    return section(
        "communication",
        "Communication of a step",
        note(
            "Calls and bytes of the pipeline rank that has most of them. Bytes are of the whole tensor: the sum, what "
            "is gathered or scattered, what a rank sends to all others, or to its neighbour."
        ),
        table(("group", "where", "collective", "size", "calls", "each, mean", "GB in all"), rows, words=3)
        if rows
        else note("None: there is one rank."),
    )


# Search


def _search(plan: Plan, found: Sequence[Candidate]) -> Markup:
    planned = [candidate for candidate in found if candidate.plan is not None]
    fitting = [candidate for candidate in planned if not candidate.reason]
    front = pareto_front(planned)
    parts: list[str] = [
        note(
            f"{len(found):,} layouts were looked at: {len(fitting):,} fit and leave the memory that was asked for, "
            f"{len(planned) - len(fitting):,} take too much at their peak, {len(found) - len(planned):,} need no plan "
            "to be ruled out. All but the fastest are planned coarsely, which may make a step seem a little shorter."
        )
    ]
    if planned:
        entries = [("fits", "fits"), ("refused", "does not fit"), ("front", "no layout is better in both")]
        entries += [("best", "fastest that fits")] if fitting else []
        parts += [legend(entries), pareto_chart(plan, found)]
    if fitting:
        parts += [tag("h3", "The fastest that fit"), _candidates(fitting[:BEST])]
    if front:
        parts += [
            tag("h3", "Less memory for more time: the layouts to which no other is better in both"),
            _candidates(front[::-1]),
        ]
    if len(fitting) < len(found):
        parts += [tag("h3", "Why the others do not fit"), _refusals(found)]
    return section("search", "All layouts", *parts)


def _candidates(candidates: Sequence[Candidate]) -> Markup:
    rows = []
    for candidate in candidates:
        parallel, plan = candidate.config.parallel, candidate.plan
        assert plan is not None
        rows.append(
            (
                parallel.schedule if parallel.pipeline > 1 else "–",
                candidate.config.run.recompute,
                "yes" if not candidate.reason else "no",
                str(parallel.tensor),
                str(parallel.pipeline),
                str(parallel.expert),
                str(plan.micro_batch),
                str(plan.num_microbatches),
                quantity(plan.seconds, "s"),
                f"{plan.mfu:.1%}",
                f"{plan.timeline.bubble:.1%}",
                quantity(plan.peak, "B"),
            )
        )
    header = ("schedule", "recompute", "fits", "tensor", "pipeline", "expert", "micro-batch", "microbatches")
    return table((*header, "step", "MFU", "bubble", "peak"), rows, words=3)


def _refusals(found: Sequence[Candidate]) -> Markup:
    """Kinds of reasons, the most frequent first, with one layout for each: of those that need least memory."""
    examples: dict[str, Candidate] = {}
    counts: Counter[str] = Counter()
    for candidate in sorted(found, key=lambda candidate: peak_of(candidate) if candidate.plan else 0):
        if candidate.reason:
            kind = kind_of_refusal(candidate)
            counts[kind] += 1
            examples.setdefault(kind, candidate)
    common = counts.most_common(EXAMPLES)
    rows = [(f"{count:,}", str(examples[kind]), examples[kind].reason) for kind, count in common]
    rest = sum(counts.values()) - sum(count for _, count in common)
    if rest:
        rows.append((f"{rest:,}", "", f"{len(counts) - len(common):,} more reasons"))
    return table(("layouts", "such as", "because"), rows, words=3)


def kind_of_refusal(candidate: Candidate) -> str:
    """What reasons have in common that differ in their numbers."""
    if candidate.plan is None:
        return re.sub(r"\d+(\.\d+)?((, | or )\d+)*", "#", candidate.reason)
    fullest = max(candidate.plan.ranks, key=lambda rank: rank.memory.peak)
    return max(stack(fullest.memory), key=lambda part: part[1])[0]


# What it rests on


def _model(plan: Plan, size: Size) -> Markup:
    counts, operations = asdict(size.trained), flops(plan)
    total = sum(operations.values(), Flops())
    group = plan.model.group_images
    rows = [
        _part(name, counts.get(name, 0), operations.get(name, Flops()), size, group)
        for name in {**counts, **operations}
        if counts.get(name) or name in operations
    ]
    rows += [
        _part(f"{name}, frozen", count, Flops(), size, group) for name, count in asdict(size.frozen).items() if count
    ]
    rows.append(_part("total", size.total, total, size, group))
    header = ("part", "parameters", "share", "forward", "backward", "run again")
    again = plan.config.run.recompute
    return section(
        "model",
        "Parameters and operations by part",
        note(
            "Operations are those of matrix products for one image, two for each multiply-add. Run again is what "
            f"run.recompute={again} repeats, and attention's scores. Experts count as often as tokens pass them."
        ),
        table(header, rows),
    )


def _part(name: str, count: int, operations: Flops, size: Size, images: int) -> tuple[str, ...]:
    spoken = name.replace("_", " ")
    each = (operations.forward, operations.backward, operations.again)
    told = [quantity(number / images, "FLOP") if number else "" for number in each]
    return spoken, f"{count:,}" if count else "", f"{count / size.total:.2%}" if count else "", *told


def _grounds(plan: Plan) -> Markup:
    gpu = plan.gpu
    calibrated = "the defaults, not calibrated" if gpu.efficiency == Efficiency() else "given"
    return section(
        "grounds",
        "What this rests on",
        tag("h3", f"{gpu.name}: the datasheet's rates, and the part of them that a program gets ({calibrated})"),
        table(("", "datasheet", "part", "reckoned with"), _rates(gpu, plan.config.run.dtype)),
        tag("h3", "Assumptions"),
        tag("ul", *(tag("li", text) for text in ASSUMPTIONS), class_="note"),
    )


def _rates(gpu: Gpu, dtype: str) -> Iterator[tuple[str, ...]]:
    efficiency = gpu.efficiency
    for name, rate, part, unit in (
        (f"matrix products, {dtype}", gpu.rate(dtype), efficiency.matrix, "FLOP/s"),
        ("memory, bandwidth", gpu.memory_bandwidth, efficiency.memory, "B/s"),
        ("links to GPUs of the node, each direction", gpu.link_bandwidth, efficiency.link, "B/s"),
        ("network for each GPU, each direction", gpu.network_bandwidth, efficiency.network, "B/s"),
    ):
        yield name, quantity(rate, unit), f"{part:.0%}", quantity(rate * part, unit)
    yield "memory", quantity(gpu.memory_bytes, "B"), "", quantity(gpu.memory_bytes, "B")
    yield "GPUs of a node", str(gpu.gpus_per_node), "", str(gpu.gpus_per_node)
    if gpu.cores:
        yield "cores that the ranks of a node share", str(gpu.cores), "", str(gpu.cores)
    for name, seconds in (
        ("launch of a kernel", efficiency.launch_seconds),
        ("latency of a collective in a node", efficiency.latency_seconds),
        ("latency of a collective across nodes", efficiency.network_latency_seconds),
        ("latency of each message of a collective", efficiency.message_seconds),
    ):
        yield name, "", "", quantity(seconds, "s")


def _configuration(plan: Plan) -> Markup:
    return section("configuration", "Configuration", tag("pre", plan.config.to_yaml()))
