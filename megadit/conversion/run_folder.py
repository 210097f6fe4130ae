"""A run's folder made of weights alone: to sample from, to convert, to start other runs from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import megadit
from megadit.checkpoint.stream import Outgoing, appearing, write_checkpoint
from megadit.conversion.weights import Bar, Weights, dtype_name, open_weights
from megadit.runtime.disk import write_synced
from megadit.training.build import TOKENIZER_FILE
from megadit.training.config import CONFIG_FILE, DTYPES, RunConfig, check_inputs


def import_weights(path: Path, destination: Path, bar: Bar, drop: Sequence[str] = ()) -> str:
    """Make a run's folder of an export of ours or a folder of diffusers. Returns what was done, in a line.

    `drop`: tensors of theirs to leave behind.

    Raises ValueError before anything is written; see `open_weights`.
    """
    weights = open_weights(path, drop=drop)
    dtype = run_dtype({weights.spec(name).dtype for name in weights.tensors})
    config = weights_only(RunConfig(model=weights.config.model, text=weights.config.text), destination, dtype)
    if weights.tokenizer is not None:
        config = replace(config, text=replace(config.text, tokenizer=""))  # it lies in the folder, under a known name
    tensors = [outgoing._replace(name=f"weight.{outgoing.name}") for outgoing in all_outgoing(weights, dtype)]
    write_run_folder(destination, config, 0, tensors, weights.tokenizer, bar)
    done = f"{destination}: {len(tensors)} tensors in {dtype_name(dtype)}"
    if drop:
        done += f", without {', '.join(drop)}"
    try:
        check_inputs(config)
    except ValueError as error:
        return f"{done}; to convert, not to train or draw with: {error}"
    return f"{done}; start a run with run.init_from={destination}"


def all_outgoing(weights: Weights, dtype: torch.dtype | None) -> list[Outgoing]:
    """Every parameter, whole."""
    return [weights.outgoing(name, dtype) for name in weights.tensors]


def run_dtype(found: set[torch.dtype]) -> torch.dtype:
    """The narrowest precision that a run can have and that holds weights of these exactly."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        if all(torch.promote_types(dtype, each) == dtype for each in found):
            return dtype
    raise AssertionError(found)


def weights_only(config: RunConfig, destination: Path, dtype: torch.dtype) -> RunConfig:
    """The configuration of a run's folder at `destination` with weights of that precision."""
    name = next(name for name in DTYPES if getattr(torch, name) == dtype)
    run = replace(config.run, name=destination.name, dir=str(destination.absolute()), dtype=name)
    stage = config.zero.stage
    if dtype == torch.float64:
        stage = 0  # it has no masters
    elif dtype == torch.bfloat16 and stage == 0:
        stage = 1  # it needs them
    return replace(config, run=run, zero=replace(config.zero, stage=stage))


def write_run_folder(
    destination: Path, config: RunConfig, step: int, tensors: Sequence[Outgoing], tokenizer: Path | None, bar: Bar
) -> None:
    """Write config.yaml, the tokenizer and one checkpoint; the folder appears when all of it is there."""
    with appearing(destination) as partial:
        progress = bar(sum(tensor.spec.num_bytes for tensor in tensors))
        write_synced(partial / CONFIG_FILE, config.to_yaml().encode())
        if tokenizer is not None:
            write_synced(partial / TOKENIZER_FILE, tokenizer.read_bytes())
        metadata = {"config": config.to_dict(), "megadit": megadit.__version__}
        write_checkpoint(partial, step, tensors, metadata, progress)
