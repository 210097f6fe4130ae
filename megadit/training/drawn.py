"""A run's configuration, made one of drawing; readable before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megadit.parallel.layout import ParallelConfig
from megadit.sampling import options
from megadit.sampling.config import SampleConfig
from megadit.training.config import CONFIG_FILE, RunConfig, check, check_inputs, images_per_group, load_config

PICTURES_PER_CALL = 16  # of a rank, unless it is said; guidance doubles what the network sees


def read_asked(args: argparse.Namespace, world_size: int) -> RunConfig:
    """`read_drawn` of the folder `args.run`, with the options of `sampling.options` that were given."""
    return read_drawn(args.run, world_size, options.asked(args, ParallelConfig()), options.given(args, SampleConfig))


def read_drawn(
    directory: Path,
    world_size: int,
    parallel: ParallelConfig | None = None,
    sample: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a run's folder, made one of drawing; arguments and errors as of `restore.open_sampler`."""
    trained = load_config(directory / CONFIG_FILE)
    trained = replace(trained, sample=replace(trained.sample, **sample or {}))
    config = as_drawn(trained, world_size, parallel or ParallelConfig())
    check_inputs(config)
    check(config, world_size)
    return config


def as_drawn(trained: RunConfig, world_size: int, parallel: ParallelConfig) -> RunConfig:
    """The configuration of a training, made one of drawing on another layout.

    What has a meaning backward alone does not stand in the way of a layout.
    """
    model = trained.model
    # Without a capacity images do not compete: a group as large as a training's batch would be work for nothing.
    apart = model.routing == "token_choice" and model.dropless
    group = 1 if apart else images_per_group(trained)
    # The batch of training has no other meaning here; any that fits the layout will do.
    data = replace(trained.data, global_batch=world_size * group, micro_batch=group, verify=False)
    model, objective = replace(model, routing_group=group), replace(trained.objective, keep_tokens=1.0)
    # zbv splits the backward pass, which goes with none of these; there is none.
    run = replace(trained.run, recompute="none", compile=trained.run.compile and parallel.schedule != "zbv")
    zero = replace(trained.zero, stage=min(trained.zero.stage, 1))
    return replace(trained, run=run, zero=zero, model=model, objective=objective, data=data, parallel=parallel)
