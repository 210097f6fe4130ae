"""A plan as plain data, for programs, and as lines, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megadit.model.count import flops_by_part, products_of, size_of
from megadit.planning.dry_run import table
from megadit.planning.memory import GB
from megadit.planning.meter import Collective
from megadit.planning.plan import SAMPLES, Plan

DAY = 86400.0


def to_dict(plan: Plan) -> dict[str, Any]:
    """Everything that the plan says, in plain types; bytes and seconds of one optimizer step, FLOPs of one image."""
    config, gpu = plan.config, plan.gpu
    size = size_of(config.model, config.text)
    parallel = config.parallel
    return {
        "parameters_total": size.total,
        "parameters_activated": size.activated,
        "parameters_frozen": {**asdict(size.frozen), "total": size.frozen.total},
        "parameters_trained": {**asdict(size.trained), "total": size.trained.total},
        "flops_per_image": {
            part: {name: count / plan.model.group_images for name, count in asdict(counts).items()}
            for part, counts in flops(plan).items()
        },
        "world_size": plan.world_size,
        "gpu": asdict(gpu),
        "layout": {
            **asdict(plan.layout),
            "sequence": parallel.sequence,
            "schedule": parallel.schedule,
            "recompute": config.run.recompute,
            "zero_stage": config.zero.stage,
            "micro_batch": plan.micro_batch,
            "microbatches": plan.num_microbatches,
        },
        "ranks": [
            {
                "pipeline_rank": rank.rank,
                "layers": [[layers.start, layers.stop] for layers in rank.layers],
                "parameters": rank.parameters,
                "memory": {**asdict(rank.memory), "state": rank.memory.state, "peak": rank.memory.peak},
                "collectives": [
                    {**call._asdict(), "count": count, "within_node": plan.is_within_node(call.axis)}
                    for call, count in sorted(rank.collectives.items())
                ],
            }
            for rank in plan.ranks
        ],
        "peak_bytes": plan.peak,
        "memory_bytes": gpu.memory_bytes,
        "headroom": plan.headroom,
        "seconds": {"step": plan.seconds, **plan.terms},
        "bubble": plan.timeline.bubble,
        "imbalance": plan.timeline.imbalance,
        "mfu": plan.mfu,
        "tflops_per_gpu": plan.flops / plan.seconds / plan.world_size / 1e12,
        "images_per_second": plan.images_per_second,
        "samples": SAMPLES,
        "days": days(plan),
        "gpu_hours": days(plan) * 24 * plan.world_size,
    }


def flops(plan: Plan) -> dict[str, Any]:
    """Operations by part, for the images of one routing group."""
    config = plan.config
    products = products_of(plan.model, config.text, plan.model.group_images, tokens=plan.tokens)
    return flops_by_part(products, config.run.recompute)


def days(plan: Plan) -> float:
    """For the samples of the paper's training."""
    return SAMPLES / plan.images_per_second / DAY


def lines(plan: Plan) -> Iterator[str]:
    """What someone who looks for a layout wants to know, a screen of it."""
    size, layout, gpu = size_of(plan.config.model, plan.config.text), plan.layout, plan.gpu
    per_image = plan.flops / plan.config.data.global_batch
    yield (
        f"{size.total / 1e9:.2f} billion parameters ({size.activated / 1e9:.2f} activated, "
        f"{size.frozen.total / 1e9:.2f} frozen), {per_image / 1e12:.2f} TFLOP per image"
    )
    sequence = ", sequence" if plan.config.parallel.sequence else ""
    yield (
        f"{plan.world_size} x {gpu.name}: tensor {layout.tp}{sequence}, pipeline {layout.pp} "
        f"({plan.config.parallel.schedule}), expert {layout.ep}, data {layout.dp}; {plan.num_microbatches} x "
        f"{plan.micro_batch} images, recompute {plan.config.run.recompute}, ZeRO-{plan.config.zero.stage}"
    )
    yield from table(
        ("rank", "layers", "weights", "masters", "moments", "ema", "buffers", "gradients", "activations", "peak GB"),
        [
            (
                str(rank.rank),
                ", ".join(f"{stage.start}-{stage.stop - 1}" for stage in rank.layers),
                *(
                    f"{getattr(rank.memory, name) / GB:.2f}"
                    for name in ("weights", "masters", "moments", "ema", "buffers", "gradients", "activations", "peak")
                ),
            )
            for rank in plan.ranks
        ],
    )
    fits = "fits" if plan.headroom >= 0 else "DOES NOT FIT"
    yield f"{fits}: {plan.peak / GB:.1f} of {gpu.memory_bytes / GB:.0f} GB, {plan.headroom:.0%} to spare"
    yield "communication of a step, of the rank that has most of it"
    yield from table(
        ("group", "size", "where", "collective", "times", "GB"),
        [
            (axis, str(plan.groups[axis][0]), where(plan, axis), operation, f"{count:,}", f"{nbytes / GB:.3f}")
            for (axis, operation), (count, nbytes) in sorted(traffic(plan).items())
        ],
    )
    terms = ", ".join(f"{name} {seconds:.3f}" for name, seconds in plan.terms.items())
    yield f"a step takes {plan.seconds:.3f} s, as estimated: {terms}"
    yield (
        f"bubble {plan.timeline.bubble:.1%}, imbalance {plan.timeline.imbalance:.1%}, MFU {plan.mfu:.1%}, "
        f"{plan.images_per_second:,.0f} images/s"
    )
    yield (
        f"{SAMPLES / 1e9:.2f} billion samples (800K steps of 4096) take {days(plan):.1f} days, "
        f"{days(plan) * 24 * plan.world_size:,.0f} GPU-hours"
    )


def where(plan: Plan, axis: str) -> str:
    return "in a node" if plan.is_within_node(axis) else "across nodes"


def traffic(plan: Plan) -> dict[tuple[str, str], tuple[int, int]]:
    """(axis, operation) -> (calls, bytes) of the rank that has most of them."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for rank in plan.ranks:
        for key, value in _by_kind(rank.collectives).items():
            found[key] = max(found.get(key, (0, 0)), value, key=lambda pair: pair[1])
    return found


def _by_kind(collectives: Counter[Collective]) -> dict[tuple[str, str], tuple[int, int]]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for call, count in collectives.items():
        before = found.get(call[:2], (0, 0))
        found[call[:2]] = before[0] + count, before[1] + count * call.nbytes
    return found
