"""One network's weights in whatever form they lie: a checkpoint, an export of ours, a folder of diffusers.

What is written from them is read when it is written, a part at a time: this holds names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadit.checkpoint.source import CheckpointSource, FolderSource, Source, Spec, open_source
from megadit.checkpoint.stream import Outgoing, Progress
from megadit.conversion.mapping import MappedSource
from megadit.data.config import DataConfig
from megadit.model.ecdit import whole_model
from megadit.parallel.layout import ParallelConfig
from megadit.parallel.placement import Placement, placement_of
from megadit.training.build import tokenizer_beside
from megadit.training.config import RunConfig, check, parse
from megadit.training.drawn import as_drawn

KINDS = {"model": "weight", "master": "master", "ema": "ema"}  # what may be exported, and its prefix in a checkpoint
FORMAT = "megadit"  # in an export's config.json
PART_ELEMENTS = 1 << 20  # read and written at a time, unless one row, such as an expert, has more

Bar = Callable[[int], Progress]  # begins a progress bar of so many bytes


@dataclass(frozen=True)
class Weights:
    """Tensors of a network by parameter name."""

    source: Source
    kind: str  # a key of `KINDS`
    config: RunConfig  # the run's where there was one; of others the sections model and text alone
    step: int
    tensors: dict[str, str]  # parameter -> the source's tensor
    tokenizer: Path | None

    def spec(self, parameter: str) -> Spec:
        return self.source.tensors[self.tensors[parameter]]

    def outgoing(self, parameter: str, dtype: torch.dtype | None = None) -> Outgoing:
        """The whole parameter as one to write, in its own precision by default."""
        shape = self.spec(parameter).shape
        return self.outgoing_box(parameter, (0,) * len(shape), shape, dtype)

    def outgoing_box(
        self, parameter: str, offsets: Sequence[int], sizes: Sequence[int], dtype: torch.dtype | None = None
    ) -> Outgoing:
        """A box of a parameter as one to write."""
        wanted = dtype or self.spec(parameter).dtype

        def parts() -> Iterator[Tensor]:
            for part in read_in_parts(self.source, self.tensors[parameter], offsets, sizes):
                yield converted(part, wanted, parameter)

        return Outgoing(parameter, tuple(sizes), wanted, parts)


def read_in_parts(
    source: Source, tensor: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """A box of a tensor, rows at a time, of an expert tensor as few experts as make a part."""
    spec = source.tensors[tensor]
    offsets = (0,) * len(spec.shape) if offsets is None else offsets
    sizes = spec.shape if sizes is None else sizes
    if not sizes:
        yield source.read(tensor)
        return
    step = max(1, PART_ELEMENTS // max(1, math.prod(sizes[1:])))
    for begin in range(0, sizes[0], step):
        rows = min(step, sizes[0] - begin)
        yield source.read(tensor, (offsets[0] + begin, *offsets[1:]), (rows, *sizes[1:]))


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rounded to `dtype`. Raises ValueError naming the tensor if that makes a finite element infinite."""
    out = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not torch.equal(out.isfinite(), tensor.isfinite()):
        raise ValueError(
            f"{name} has elements beyond the range of {dtype_name(dtype)}; use --dtype bfloat16 or float32"
        )
    return out


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def open_weights(path: Path, kind: str | None = None, drop: Sequence[str] = ()) -> Weights:
    """The weights at `path`. `kind`: a key of `KINDS`; by default a checkpoint's averages, if it has them.

    `drop`: tensors of a folder of diffusers to leave behind. Raises ValueError naming the file for what is no source,
    and listing every tensor that does not fit the network of its configuration.
    """
    source = open_source(path)
    if isinstance(source, CheckpointSource):
        return checkpoint_weights(source, kind, tokenizer_beside(path))
    if kind is not None and kind != source.config.get("weights", "model"):
        has = source.config.get("weights", "model")
        raise ValueError(f"{path} holds the weights {has!r} alone; leave out --weights, or name the run")
    return exported_weights(source) if source.config.get("format") == FORMAT else diffusers_weights(source, drop)


def checkpoint_weights(source: CheckpointSource, kind: str | None, tokenizer: Path | None) -> Weights:
    """Of a checkpoint of ours. Raises ValueError."""
    present = [known for known, prefix in KINDS.items() if source.parameters(prefix)]
    kind = kind or ("ema" if "ema" in present else "model")
    if kind not in present:
        raise ValueError(f"{source.path} holds no weights {kind!r}; it holds {', '.join(present) or 'none'}")
    config = run_config(source.config, source.path)
    tensors = {name: f"{KINDS[kind]}.{name}" for name in source.parameters(KINDS[kind])}
    return _fitting(Weights(source, kind, config, source.step, tensors, tokenizer))


def exported_weights(source: FolderSource) -> Weights:
    """Of an export of ours, which must be whole. Raises ValueError."""
    if "tensor" in source.config or "expert" in source.config:
        cut = ", ".join(f"{axis} {source.config.get(axis)}" for axis in ("tensor", "expert"))
        raise ValueError(
            f"{source.path} is one rank's part of a network ([rank, degree]: {cut}), without the other parts; name an "
            "export that was made without --tensor and --expert"
        )
    config = run_config({section: source.config.get(section) for section in ("model", "text")}, source.path)
    tensors = {name: name for name in source.tensors}
    step, kind = source.config.get("step"), str(source.config.get("weights", "model"))
    tokenizer = tokenizer_beside(source.path)
    return _fitting(Weights(source, kind, config, step if type(step) is int else 0, tensors, tokenizer))


def diffusers_weights(source: FolderSource, drop: Sequence[str]) -> Weights:
    """Of a folder of diffusers, under our names. Raises ValueError."""
    mapped = MappedSource.of(source, drop)
    config = run_config(mapped.sections, source.path)
    tensors = {name: name for name in mapped.tensors}
    return _fitting(Weights(mapped, "model", config, 0, tensors, None))


def run_config(raw: Mapping[str, Any], path: Path) -> RunConfig:
    """The configuration that lies with weights, whose network can be built. Raises ValueError naming the path."""
    if not isinstance(raw.get("model"), Mapping):
        raise ValueError(f"{path} does not say which model its weights are of")
    try:
        config = parse({key: value for key, value in raw.items() if value is not None}, str(path))
        # The network alone: how it was trained is no matter here, but for how many images of a batch compete.
        data = DataConfig(micro_batch=config.data.micro_batch or 1)
        check(as_drawn(RunConfig(model=config.model, text=config.text, data=data), 1, ParallelConfig()), 1)
    except ValueError as error:
        raise ValueError(f"{path}: its configuration is not one of this version: {error}") from error
    return config


class Parameter(NamedTuple):
    """A parameter of a network that is not built."""

    shape: tuple[int, ...]
    placement: Placement


def parameters_of(config: RunConfig) -> dict[str, Parameter]:
    """Every parameter of the whole network, by name."""
    network = whole_model(config.model, config.text)
    return {name: Parameter(tuple(p.shape), placement_of(p)) for name, p in network.named_parameters()}


def _fitting(weights: Weights) -> Weights:
    """Raises ValueError listing every tensor that the network and the source do not have in common."""
    wanted = {name: parameter.shape for name, parameter in parameters_of(weights.config).items()}
    found = {name: weights.spec(name).shape for name in weights.tensors}
    if faults := differences(wanted, found, "the network", "the source"):
        raise ValueError(listing(f"{weights.source.path} does not fit the network of its configuration", faults))
    strange = [
        f"{name} is {weights.spec(name).dtype}" for name in found if not weights.spec(name).dtype.is_floating_point
    ]
    if strange:
        raise ValueError(listing(f"{weights.source.path} holds weights that are no floating-point numbers", strange))
    return weights


def differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], whole: str, part: str
) -> list[str]:
    """Each tensor that two tables of shapes do not have in common, in words.

    >>> differences({"a": (1,), "b": (2,)}, {"b": (3,), "c": ()}, "the network", "the file")
    ['a: the file lacks it', 'b: shape (3,) in the file, (2,) in the network', 'c: only the file has it']
    """
    faults = {name: f"{name}: {part} lacks it" for name in wanted.keys() - found.keys()}
    faults |= {name: f"{name}: only {part} has it" for name in found.keys() - wanted.keys()}
    for name in wanted.keys() & found.keys():
        if wanted[name] != found[name]:
            faults[name] = f"{name}: shape {found[name]} in {part}, {wanted[name]} in {whole}"
    return [faults[name] for name in sorted(faults)]


def listing(what: str, faults: Sequence[str]) -> str:
    """One message of several faults, each on a line."""
    return "\n  ".join([f"{what}:", *faults])
