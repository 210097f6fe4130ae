"""A dry run against what happens: real trainings of several ranks, whose allocations torch's profiler reports."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megadit.planning.dry_run import dry_run
from megadit.planning.meter import Meter
from megadit.training.config import load_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

CONFIG = "tests/configs/parity.yaml"
# Wide and with enough images that what torch allocates here and there does not matter.
WIDE = ("model.width=128", "model.head_width=16", "model.image_size=8", "data.global_batch=64", "data.micro_batch=8")
STAGE_0, ZERO_1 = ("zero.stage=0", "run.dtype=float32"), ("zero.stage=1", "run.dtype=float32")
CASES = {
    "tensor": (2, (*STAGE_0, "parallel.tensor=2")),
    "pipeline": (2, (*STAGE_0, "parallel.pipeline=2")),
    "tensor_expert_recomputed": (4, (*STAGE_0, "parallel.tensor=2", "parallel.expert=2", "run.recompute=block")),
    "pipeline_expert_zero": (4, (*ZERO_1, "parallel.pipeline=2", "parallel.expert=2")),
    "interleaved_tensor": (4, (*STAGE_0, "parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.tensor=2")),
    "zbv": (2, (*STAGE_0, "parallel.pipeline=2", "parallel.schedule=zbv")),
    "sequence_bfloat16": (
        2,
        ("zero.stage=1", "run.dtype=bfloat16", "parallel.tensor=2", "parallel.sequence=true"),
    ),
}


def measured(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, object]:
    """Of the second step, in which nothing is set up any more: bytes before it, the most during it, its collectives."""
    from torch.profiler import ProfilerActivity, profile

    from tests.training.assembled import assembled, make_step

    run = assembled(rank, world_size, *overrides, path=CONFIG)
    make_step(run, 1)
    storages = {
        storage._cdata: storage.nbytes() for storage in (parameter.untyped_storage() for _, parameter in run.named)
    }
    weights = sum(storages.values())
    fragments = Counter()
    for fragment in run.engine.fragments():
        fragments["masters" if fragment.kind == "master" else "moments"] += fragment.flat.nbytes
    averages = sum(average.flat.nbytes for average in run.ema.averages)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        make_step(run, 2)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    with Meter(run.grid, torch.device("cpu")) as meter:
        make_step(run, 3)
    return {
        "weights": weights,
        **fragments,
        "ema": averages,
        "peak": peak,
        "collectives": Counter(tuple(call) for call in meter.collectives),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_real_rank_needs_what_its_dry_run_said(name):
    world_size, overrides = CASES[name]
    overrides = (*WIDE, *overrides)
    config = load_config(CONFIG, overrides)
    for rank, real in enumerate(run_ranks(measured, world_size, overrides)):
        played = dry_run(config, world_size, rank)
        assert Counter({tuple(call): count for call, count in played.collectives.items()}) == real["collectives"]
        if config.zero.stage == 0:  # ZeRO's are held against DeepSpeed's own tensors elsewhere
            assert played.memory.weights == real["weights"]
            assert played.memory.moments == real["moments"]
        assert played.memory.ema == real["ema"]
        held = played.memory.state + played.memory.buffers
        assert played.peak - held == pytest.approx(real["peak"], rel=0.1)
