"""The mean of the weights of several checkpoints of one network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megadit.checkpoint.stream import Outgoing
from megadit.conversion.run_folder import run_dtype, weights_only, write_run_folder
from megadit.conversion.weights import Bar, Weights, converted, differences, dtype_name, listing, open_weights
from megadit.training.config import differing


def average_weights(
    paths: Sequence[Path], destination: Path, kind: str | None, ratios: Sequence[float] | None, bar: Bar
) -> str:
    """Make a run's folder of the mean of the weights at `paths`. Returns what was done, in a line.

    `ratios` are their shares, by default equal. Raises ValueError before anything is written for sources that are not
    sound, and one that lists how they differ.
    """
    shares = shares_of(len(paths), ratios)
    sources = open_alike(paths, kind)
    first = sources[0]
    dtype = run_dtype({source.spec(name).dtype for source in sources for name in source.tensors})
    config = weights_only(first.config, destination, dtype)
    tensors = [mean(sources, shares, name, dtype) for name in first.tensors]
    step = max(source.step for source in sources)
    write_run_folder(destination, config, step, tensors, first.tokenizer, bar)
    return f"{destination}: mean of the weights {first.kind!r} of {len(sources)} sources, in {dtype_name(dtype)}"


def shares_of(count: int, ratios: Sequence[float] | None) -> list[float]:
    """Shares that sum to 1.

    >>> shares_of(2, [3, 1])
    [0.75, 0.25]
    """
    if ratios is None:
        return [1 / count] * count
    if len(ratios) != count:
        raise ValueError(f"--ratios names {len(ratios)} shares of {count} sources; give one for each")
    if not (all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios) and sum(ratios) > 0):
        raise ValueError(f"--ratios {' '.join(map(str, ratios))}: shares must be 0 or more, and not all 0")
    return [ratio / sum(ratios) for ratio in ratios]


def open_alike(paths: Sequence[Path], kind: str | None) -> list[Weights]:
    """The weights at `paths`, of one network. Raises ValueError listing every difference."""
    sources = [open_weights(paths[0], kind)]
    sources += [open_weights(path, kind or sources[0].kind) for path in paths[1:]]
    first = sources[0]
    faults = []
    for other in sources[1:]:
        ours, theirs = ({name: each.spec(name).shape for name in each.tensors} for each in (first, other))
        faults += differences(ours, theirs, str(first.source.path), str(other.source.path))
        plain, others = first.config.to_dict(), other.config.to_dict()
        for section in ("model", "text"):
            changes = differing(section, plain[section], others[section])
            faults += [f"{change} in {other.source.path}" for change in changes if ".tokenizer=" not in change]
    if faults:
        raise ValueError(listing("these are not of one network", faults))
    return sources


def mean(sources: Sequence[Weights], shares: Sequence[float], name: str, dtype: torch.dtype) -> Outgoing:
    """The mean of a parameter, summed in float64."""

    def parts() -> Iterator[Tensor]:
        streams = [source.outgoing(name).parts() for source in sources]
        for rows in zip(*streams, strict=True):
            total = rows[0].double() * shares[0]
            for part, share in zip(rows[1:], shares[1:], strict=True):
                total.add_(part, alpha=share)  # in float64
            yield converted(total, dtype, name)

    return Outgoing(f"weight.{name}", sources[0].spec(name).shape, dtype, parts)
