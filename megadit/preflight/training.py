"""A training small enough for a check, in any layout, and the same training by one rank alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist

from megadit.checkpoint import Saver
from megadit.parallel.grid import Grid, Group
from megadit.parallel.init import Constant, Init, Normal
from megadit.parallel.layout import Layout, ParallelConfig
from megadit.runtime.launch import Process
from megadit.training.build import Inputs, Run, assemble_run
from megadit.training.config import RunConfig, parse
from megadit.training.progress import Progress
from megadit.training.step import read, train_step

# EXACT: plain AdamW, as exact as float64 is. SHARDED: float32 under ZeRO-1, where every expert takes every token, for
# rounding could turn a choice between two tokens. WHOLE: what SHARDED is compared with.
EXACT, SHARDED, WHOLE = "float64", "float32, ZeRO-1", "float64, every token"
PRECISIONS = {EXACT: ("float64", 0, False), SHARDED: ("float32", 1, True), WHOLE: ("float64", 0, True)}
LARGEST_ALONE = 32  # images of one microbatch of a rank alone


class OwnGrid(Grid):
    """A world of this process alone, inside the larger one: whatever runs on it waits for nobody."""

    def __init__(self) -> None:
        self._alone = Group(dist.new_group([dist.get_rank()], use_local_synchronization=True), 1, 0)
        super().__init__(Layout(1, 1, 1, 1), 0)

    def _create(self, name: str, axes: tuple[str, ...]) -> Group:
        return self._alone


def configuration(
    layouts: Sequence[ParallelConfig], world_size: int, chosen: ParallelConfig | None, precision: str, steps: int
) -> RunConfig:
    """The training in one layout (None: alone), of a model and a batch that all `layouts` can cut.

    Raises ValueError naming what does not fit.
    """
    tensor = math.lcm(4, *(each.tensor for each in layouts))
    experts = math.lcm(4, *(each.tensor * each.expert for each in layouts))
    layers = max(4, *(each.pipeline * each.stages_on_rank for each in layouts))
    passes = [world_size // (each.tensor * each.pipeline) * each.pipeline for each in layouts]
    batch = math.lcm(*passes)
    batch *= math.ceil(8 / batch)
    dtype, stage, whole = PRECISIONS[precision]
    alone = max(size for size in range(1, LARGEST_ALONE + 1) if batch % size == 0)
    raw = {
        "run": {"name": "preflight", "dir": "preflight-is-never-written", "steps": steps, "dtype": dtype, "seed": 1},
        "model": {
            **{"layers": layers, "width": 8 * tensor, "heads": tensor, "kv_heads": tensor, "head_width": 8},
            **{"experts": experts, "image_size": 8, "channels": 1, "patch": 2, "modulation": "gated"},
            "capacity_factor": float(experts) if whole else 2.0,
        },
        "text": {"width": 16, "length": 28, "vocabulary": 96, "layers": 1, "heads": 2},
        "zero": {"stage": stage},
        "data": {"kind": "digits", "global_batch": batch, "micro_batch": 0 if chosen else alone},
        # eps: a gradient that is nothing but rounding must not become a whole step of AdamW's.
        "optim": {"lr": 3e-3, "warmup": 2, "weight_decay": 0.1, "clip": 0.2, "eps": 1e-5},
        "parallel": {} if chosen is None else vars(chosen),
    }
    return parse(raw, "the check's own configuration")


def start_of(name: str) -> Init:
    """No weight starts as zero, so that every path carries a gradient from the first step on."""
    return Constant(1.0) if name.endswith("norm.weight") else Normal(0.1)


def train(config: RunConfig, grid: Grid, inputs: Inputs, process: Process, saver: Saver) -> list[float]:
    """Every step's loss, then every step's gradient norm. Collective over the grid."""
    run = assembled(config, grid, inputs, process, saver)
    unread, progress = [], Progress()
    while progress.step < config.run.steps:
        outcome = train_step(run, progress)
        unread.append(outcome.unread)
        progress = outcome.progress
    reports = read(run, unread)
    return [report.loss for report in reports] + [report.grad_norm for report in reports]


def assembled(config: RunConfig, grid: Grid, inputs: Inputs, process: Process, saver: Saver) -> Run:
    """The training before its first step. Collective over the grid."""
    return assemble_run(config, grid, inputs, process, saver, start_of)
