"""What is kept of a finished trial: a small JSON file from which every figure of a report follows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megadit.model.count import activated_parameters, forward_flops, parameters, weights_of
from megadit.study.design import SCORE_FILE, Trial, fingerprint
from megadit.training.config import CONFIG_FILE, RunConfig, load_config
from megadit.training.metrics import METRICS_FILE, read_metrics

LAST = 50  # steps that final means are over


def record_of(trial: Trial, label: str, run: Path) -> dict[str, Any]:
    """Everything that is told of a trial whose run and score are in this folder.

    Raises ValueError naming the file that is not there, or not readable.
    """
    config = load_config(run / CONFIG_FILE)
    lines = read_metrics(run / METRICS_FILE)
    try:
        scored = json.loads((run / SCORE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run / SCORE_FILE}: {error}") from error
    return {
        "place": trial.place,
        "variant": trial.variant,
        "label": label or trial.variant,
        "seed": trial.seed,
        "overrides": list(trial.overrides),
        "fingerprint": fingerprint(config),
        **size(config),
        **course_of(lines, config),
        "score": scored,
    }


def size(config: RunConfig) -> dict[str, Any]:
    """Parameters, and operations of a forward pass on one image."""
    model, text = config.model, config.text
    return {
        "parameters": parameters(weights_of(model, text)).total,
        "activated_parameters": activated_parameters(model, text),
        "forward_flops": forward_flops(model, text),
    }


def course_of(lines: Sequence[Mapping[str, Any]], config: RunConfig) -> dict[str, Any]:
    """Loss, times and routing along the way. What was minimised is left out: variants may add a balance loss to it."""
    made = [line for line in lines if not line["skipped"]]
    return {
        "steps": lines[-1]["step"],
        "images": lines[-1]["step"] * config.data.global_batch,
        "skipped": len(lines) - len(made),
        "heldout_loss": next(line["heldout_loss"] for line in reversed(lines) if "heldout_loss" in line),
        "seconds_per_step": median(line["seconds"] for line in lines),
        "training_seconds": sum(line["seconds"] for line in lines),
        "peak_memory_gb": max(line["peak_memory_gb"] for line in lines),
        "heldout_curve": [[line["step"], line["heldout_loss"]] for line in lines if "heldout_loss" in line],
        "routing": routing_of(made[-LAST:]),
    }


def routing_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means of each layer's statistics over some steps; `load` is that of the busiest expert over an even one."""
    layers: dict[str, dict[str, float]] = {}
    for layer in lines[-1]["routing"]:
        keys = lines[-1]["routing"][layer]
        layers[layer] = {
            key: fmean(_number(line["routing"][layer][key]) for line in lines if layer in line["routing"])
            for key in keys
        }
    return layers


def _number(value: float | list[float]) -> float:
    return max(value) if isinstance(value, list) else value
