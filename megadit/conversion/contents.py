"""What a source holds: names, shapes, counts."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

from megadit.checkpoint.source import CheckpointSource, Spec, open_source
from megadit.conversion.weights import FORMAT, KINDS, dtype_name
from megadit.model.config import ECDiTConfig
from megadit.training.config import parse

_EXPERT = re.compile(r"blocks\.(\d+)\.feedforward\.experts\.")


def contents(path: Path, names: str = "*") -> dict[str, Any]:
    """Plain data on the source at `path`, with those of its tensors whose names match the pattern `names`.

    Raises ValueError for what is no source, and when no name matches.
    """
    source = open_source(path)
    chosen = {name: spec for name, spec in source.tensors.items() if fnmatch.fnmatchcase(name, names)}
    if not chosen and source.tensors:
        raise ValueError(
            f"{source.path} has no tensor whose name matches {names!r}; such as {next(iter(source.tensors))}"
        )
    kind: str
    step: int | None
    if isinstance(source, CheckpointSource):
        parameters = next(filter(None, map(source.parameters, KINDS.values())), {})
        kind, step = "checkpoint", source.step
    else:
        parameters = source.tensors
        kind, step = "export" if source.config.get("format") == FORMAT else "diffusers", source.config.get("step")
    return {
        "path": str(source.path),
        "kind": kind,
        "step": step,
        "bytes": sum(spec.num_bytes for spec in source.tensors.values()),
        "parameters": counts(parameters, model_of(source.config, path)),
        "tensors": {
            name: {"shape": list(spec.shape), "dtype": dtype_name(spec.dtype), "bytes": spec.num_bytes}
            for name, spec in sorted(chosen.items(), key=lambda item: _natural(item[0]))
        },
        "config": source.config,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def model_of(config: dict[str, Any], path: Path) -> ECDiTConfig | None:
    """The model section, where there is one that this version knows."""
    try:
        return parse({"model": config["model"]}, str(path)).model
    except (KeyError, ValueError):
        return None


def counts(parameters: dict[str, Spec], model: ECDiTConfig | None) -> dict[str, int]:
    """Parameters in all and in experts, and of a model of ours those that work on a token, on average."""
    found = {"total": sum(spec.numel for spec in parameters.values()), "experts": 0}
    activated = float(found["total"])
    for name, spec in parameters.items():
        layer = _EXPERT.match(name)
        if layer is None:
            continue
        found["experts"] += spec.numel
        if model is not None:
            activated -= spec.numel * (1 - picked(model, int(layer[1])))
    return found if model is None else {**found, "activated": round(activated)}


def picked(model: ECDiTConfig, layer: int) -> float:
    """The share of a layer's experts that work on a token, on average; with a capacity, when no slot stays empty."""
    if model.routing == "token_choice" and model.dropless:
        return model.top_k / model.experts
    images = model.routing_group if isinstance(model.routing_group, int) else 1
    return model.capacity(layer, images * model.tokens) / (images * model.tokens)


def as_table(found: dict[str, Any]) -> str:
    """Plain text for a reader."""
    rows = [
        (name, tensor["dtype"], " x ".join(map(str, tensor["shape"])) or "-", f"{tensor['bytes']:,}")
        for name, tensor in found["tensors"].items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), f"{row[3]:>15}"])
        for row in rows
    ]
    step = "" if found["step"] is None else f", step {found['step']}"
    count = ", ".join(f"{number:,} {what}" for what, number in found["parameters"].items())
    lines += ["", f"{found['path']}: {found['kind']}{step}, {found['bytes']:,} bytes", f"parameters: {count}"]
    for section in ("model", "text"):
        if isinstance(values := found["config"].get(section), dict):
            lines.append(f"{section}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
    return "\n".join(lines)
