"""One training step of one rank without numbers: what it holds, what it sends, and that its code runs at all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megadit.parallel.layout import Layout
from megadit.planning.memory import GB, Memory
from megadit.planning.meter import Collective
from megadit.planning.simulation import SimulatedPipeline, fake_world, simulated
from megadit.training.config import RunConfig, check
from megadit.training.progress import Progress
from megadit.training.step import train_step


@dataclass(frozen=True)
class DryRun:
    """What one rank did in one step. peak: most bytes that were alive at once. seconds: that this took here."""

    rank: int
    layout: Layout
    stages: list[range]
    parameters: int
    memory: Memory
    peak: int
    collectives: Counter[Collective]
    flops: int
    seconds: float


def roles(layout: Layout) -> list[int]:
    """A rank of each pipeline rank: those that differ along the other axes hold and send as much."""
    return [int(ranks.flatten()[0]) for ranks in layout.ranks]


def ranks_to_play(config: RunConfig, world_size: int, rank: int | None, all_stages: bool) -> list[int]:
    """What a command line asks for. Raises ValueError where it contradicts itself, and where `check` does."""
    if world_size < 1:
        raise ValueError(f"--world {world_size} must be 1 or more")
    layout = check_plannable(config, world_size)
    if all_stages and rank is not None:
        raise ValueError("--as-rank plays one process, --all-stages one of each pipeline rank; give one of them")
    return roles(layout) if all_stages else [rank or 0]


def dry_run(config: RunConfig, world_size: int, rank: int) -> DryRun:
    """Play one step as this rank. Raises ValueError as `check_plannable` does."""
    layout = check_plannable(config, world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not below the {world_size} processes of the world")
    begin = time.perf_counter()
    with fake_world(rank, world_size), simulated(config, layout, rank) as (run, meter):
        live = dict(meter.live)
        train_step(run, Progress())
        assert isinstance(run.pipeline, SimulatedPipeline) and run.pipeline.peaks is not None
        training, updating = run.pipeline.peaks, meter.take_peaks()
        kept = sum(bytes_ for name, bytes_ in meter.live.items() if name != "gradients")  # leftovers of the step, too
        return DryRun(
            rank=rank,
            layout=layout,
            stages=[stage.layers for stage in run.stages],
            parameters=sum(parameter.numel() for _, parameter in run.named),
            memory=Memory(
                **{name: live.get(name, 0) for name in ("weights", "masters", "moments", "ema")},
                buffers=training.of.get("buffers", 0),
                gradients=training.of.get("gradients", 0),
                activations=training.of.get("activations", 0),
                updating=updating.total - kept,
            ),
            peak=max(training.total, updating.total),
            collectives=Counter(meter.collectives),
            flops=sum(operation.flops * count for operation, count in meter.operations.items()),
            seconds=time.perf_counter() - begin,
        )


def check_plannable(config: RunConfig, world_size: int) -> Layout:
    """The layout. Raises ValueError also for a model whose shapes follow the data."""
    layout = check(config, world_size)
    model = config.model
    if model.has_experts and model.routing == "token_choice" and model.dropless:
        raise ValueError(
            "model.dropless=true sends as much as the data ask for, which nobody knows beforehand; plan with "
            "model.dropless=false and model.capacity_factor=1, which is as much when the load is even"
        )
    return layout


def report(played: DryRun) -> Iterator[str]:
    """Lines for people."""
    layout, memory = played.layout, played.memory
    stages = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in played.stages)
    yield (
        f"rank {played.rank} of {layout.ranks.numel()} (tp {layout.tp}, pp {layout.pp}, ep {layout.ep}, edp "
        f"{layout.edp}): layers {stages}, {played.parameters:,} parameters, {played.seconds:.1f} s"
    )
    yield from table(("memory", "GB"), [(name, f"{getattr(memory, name) / GB:.3f}") for name in memory.__annotations__])
    yield f"  at its peak {played.peak / GB:.3f} GB, matrix products of a step {played.flops / 1e12:.3f} TFLOP"
    rows = [
        (call.axis, call.operation, f"{count:,}", f"{call.nbytes:,}", f"{count * call.nbytes / GB:.3f}")
        for call, count in sorted(played.collectives.items())
    ]
    yield from table(("group", "collective", "times", "bytes each", "GB in all"), rows)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Rows in columns, numbers to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        yield (
            "  "
            + "  ".join(
                cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
                for cell, width in zip(row, widths, strict=True)
            ).rstrip()
        )
