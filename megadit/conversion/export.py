"""Weights out of a checkpoint: whole, cut as the ranks of a layout hold them, or as a network of diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import megadit
from megadit.checkpoint.source import CONFIG_FILE, read_json
from megadit.checkpoint.stream import Outgoing, Progress, appearing, write_folder
from megadit.conversion.mapping import fitting_architecture, theirs_outgoing
from megadit.conversion.run_folder import all_outgoing
from megadit.conversion.weights import FORMAT, Bar, Weights, open_weights, parameters_of
from megadit.parallel.layout import ParallelConfig
from megadit.parallel.placement import Placement
from megadit.runtime.disk import write_synced
from megadit.training.build import TOKENIZER_FILE
from megadit.training.config import RunConfig, experts_divide, images_per_group, tensor_divides

DIFFUSERS_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Export:
    """What to write and how. `dtype` None: as it is. `tensor`, `expert`: degrees; 1 and 1 is whole."""

    weights: str | None = None
    dtype: torch.dtype | None = None
    format: Literal["megadit", "diffusers"] = "megadit"
    tensor: int = 1
    expert: int = 1
    cut: bool = False  # a folder for each rank, even if there is only one
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False


def export_weights(path: Path, destination: Path, wanted: Export, bar: Bar) -> str:
    """Write the weights at `path` to `destination`. Returns what was done, in a line.

    Raises ValueError before anything is written: for a source that is not sound, a network that diffusers cannot have,
    degrees that do not divide it, and a destination that is in use.
    """
    weights = open_weights(path, wanted.weights)
    write = _diffusers(weights, wanted) if wanted.format == "diffusers" else _ours(weights, wanted)
    with appearing(destination, is_export if wanted.overwrite else None) as partial:
        write(partial, bar)
    return f"{destination}: weights {weights.kind!r} of step {weights.step}, from {weights.source.path}"


Write = Callable[[Path, Bar], None]


def _diffusers(weights: Weights, wanted: Export) -> Write:
    if wanted.cut:
        raise ValueError("--tensor and --expert cut networks of ours; leave them out, or --format diffusers")
    model, text = weights.config.model, weights.config.text
    architecture, config = fitting_architecture(model, text, weights.source.path)
    ours = {tensor.name: tensor for tensor in all_outgoing(weights, wanted.dtype)}
    tensors = theirs_outgoing(ours, architecture, model, text)

    def write(folder: Path, bar: Bar) -> None:
        write_folder(folder, tensors, config, bar(total(tensors)), wanted.max_shard_bytes, DIFFUSERS_STEM)

    return write


def _ours(weights: Weights, wanted: Export) -> Write:
    config = export_config(weights.config, weights.step, weights.kind)
    if not wanted.cut:
        tensors = all_outgoing(weights, wanted.dtype)
        return lambda folder, bar: _write(folder, tensors, config, weights, wanted, bar(total(tensors)))
    check_degrees(weights, wanted.tensor, wanted.expert)
    parts = {
        f"tensor_{tensor:02d}_expert_{expert:02d}": (
            {**config, "tensor": [tensor, wanted.tensor], "expert": [expert, wanted.expert]},
            cut_for(weights, {"tp": (tensor, wanted.tensor), "ep": (expert, wanted.expert)}, wanted.dtype),
        )
        for tensor in range(wanted.tensor)
        for expert in range(wanted.expert)
    }

    def write(folder: Path, bar: Bar) -> None:
        progress = bar(sum(total(tensors) for _, tensors in parts.values()))
        for name, (config_of_rank, tensors) in parts.items():
            _write(folder / name, tensors, config_of_rank, weights, wanted, progress)

    return write


def _write(
    folder: Path,
    tensors: Sequence[Outgoing],
    config: dict[str, Any],
    weights: Weights,
    wanted: Export,
    progress: Progress,
) -> None:
    write_folder(folder, tensors, config, progress, wanted.max_shard_bytes)
    if weights.tokenizer is not None:
        write_synced(folder / TOKENIZER_FILE, weights.tokenizer.read_bytes())


def total(tensors: Sequence[Outgoing]) -> int:
    return sum(tensor.spec.num_bytes for tensor in tensors)


def export_config(config: RunConfig, step: int, kind: str) -> dict[str, Any]:
    """config.json of an export of ours: of the weights of a kind after so many steps."""
    if config.model.routing_group == "batch" and config.data.micro_batch:  # an export has no section data
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, routing_group=images_per_group(config))
        )
    plain = config.to_dict()
    return {
        "format": FORMAT,
        "megadit": megadit.__version__,
        "step": step,
        "weights": kind,
        "model": plain["model"],
        "text": plain["text"],
    }


Place = dict[str, tuple[int, int]]  # axis -> (this rank's index, degree)


def cut_for(weights: Weights, place: Place, dtype: torch.dtype | None) -> list[Outgoing]:
    """The part of each parameter that a rank holds."""
    tensors = []
    for name, (shape, placement) in parameters_of(weights.config).items():
        offsets, sizes = part_of(shape, placement, place)
        tensors.append(weights.outgoing_box(name, offsets, sizes, dtype))
    return tensors


def part_of(shape: Sequence[int], placement: Placement, place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of a rank's part of a parameter: along each cut the last axis is fastest.

    >>> from megadit.parallel.placement import Cut
    >>> part_of((8, 3), Placement((Cut(0, ("ep", "tp")),)), {"ep": (1, 2), "tp": (0, 2)})
    ((4, 0), (2, 3))
    """
    offsets, sizes = [0] * len(shape), list(shape)
    for cut in placement.cuts:
        index, degree = 0, 1
        for axis in cut.axes:
            index, degree = index * place[axis][1] + place[axis][0], degree * place[axis][1]
        assert sizes[cut.dim] % degree == 0, f"{degree} does not divide {tuple(shape)}"
        sizes[cut.dim] //= degree
        offsets[cut.dim] = index * sizes[cut.dim]
    return tuple(offsets), tuple(sizes)


def check_degrees(weights: Weights, tensor: int, expert: int) -> None:
    """Raises ValueError with the degrees that would do."""
    layout = ParallelConfig(tensor=tensor, expert=expert)
    config = dataclasses.replace(weights.config, parallel=layout)
    for rule in (tensor_divides, experts_divide):
        for fault in rule(config, tensor * expert):
            spoken = fault.replace("parallel.tensor", "--tensor").replace("parallel.expert", "--expert")
            raise ValueError(f"{weights.source.path} cannot be cut so: {spoken}")


def is_export(folder: Path) -> bool:
    """Whether a folder holds nothing but what an export of ours writes, and says that it is one.

    One that was written for diffusers looks like any other model of theirs: it stays.
    """
    entries = list(folder.iterdir())
    if all(entry.name.startswith("tensor_") and entry.is_dir() for entry in entries):
        return all(is_export(entry) for entry in entries)
    return is_ours(folder / CONFIG_FILE) and all(
        entry.name in (CONFIG_FILE, TOKENIZER_FILE) or entry.name.endswith((".safetensors", ".safetensors.index.json"))
        for entry in entries
    )


def is_ours(config: Path) -> bool:
    try:
        return read_json(config).get("format") == FORMAT
    except ValueError:
        return False
