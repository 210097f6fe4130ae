"""What a study compares: a base configuration, variants of it, seeds, and how pictures are judged; read from YAML.

name: cpu
base: base.yaml              # a run's configuration, beside the study
set: [run.steps=800]         # overrides of every run
seeds: [0, 1, 2]
same_flops: true             # variants must do the same work in a forward pass, to 1 %
variants:
  dense: {label: dense, set: [model.experts=0, model.ffn_ratio=6]}
  expert_choice: {label: expert choice}
judge: {trained: 100, heldout: 40, seed: 1}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megadit.training.config import RunConfig, check, check_inputs, load_config

SCORE_FILE = "shapes.json"  # what the judge writes into a run's folder
FLOPS_TOLERANCE = 0.01
STRICT = ConfigDict(extra="forbid")  # an unknown key is an error


class Failed(RuntimeError):
    """A trial's training or judging ended with an error."""


@dataclass(frozen=True)
class Variant:
    """One of what is compared. set: `section.key=value` overrides of the base."""

    __pydantic_config__ = STRICT

    label: str = ""
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgeConfig:
    """Pictures of each task, of combinations that training shows and of held-out ones, and the seed of their noise."""

    __pydantic_config__ = STRICT

    trained: Annotated[int, Field(ge=1)] = 100
    heldout: Annotated[int, Field(ge=0)] = 40
    seed: int = 1


@dataclass(frozen=True)
class Study:
    """What is compared with what. The first variant is what the others are set against."""

    __pydantic_config__ = STRICT

    name: str
    base: str
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    seeds: tuple[int, ...] = (0, 1, 2)
    set: tuple[str, ...] = ()
    same_flops: bool = False
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class Trial:
    """One training: a variant with a seed. place: the variant's in the study."""

    place: int
    variant: str
    seed: int
    base: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}_seed{self.seed}"

    def config(self) -> RunConfig:
        """Raises ValueError for overrides that the base does not have or that do not go together."""
        return load_config(self.base, self.overrides)


def fingerprint(config: RunConfig) -> str:
    """Of everything that a trial's result depends on, so not of where it is written."""
    plain = config.to_dict()
    for key in ("dir", "name"):
        del plain["run"][key]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_study(path: Path) -> Study:
    """Raises ValueError naming the file, and the key or variant at fault, before anything is trained."""
    try:
        raw = yaml.safe_load(path.read_text())
        study: Study = TypeAdapter(Study).validate_python(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if len(study.seeds) < 2 or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"{path}: seeds {list(study.seeds)} must be two or more, all different: intervals are of them")
    from megadit.model.count import forward_flops  # it takes torch, and what is above does not

    flops = {}
    for trial in trials(study, path):
        try:
            config = trial.config()
            check(config, 1)
            check_inputs(config)
            _check_judged(config)
        except ValueError as error:
            raise ValueError(f"{path}: variant {trial.variant}: {error}") from error
        flops[trial.variant] = forward_flops(config.model, config.text)
    low, high = min(flops.values()), max(flops.values())
    if study.same_flops and high > low * (1 + FLOPS_TOLERANCE):
        told = ", ".join(f"{name} {value / 1e6:.2f}" for name, value in flops.items())
        raise ValueError(f"{path}: same_flops, but a forward pass takes (MFLOP) {told}; change model.ffn_ratio")
    return study


def _check_judged(config: RunConfig) -> None:
    """Raises ValueError for a run without the figures that a record has."""
    if config.data.kind != "shapes":
        raise ValueError(f"data.kind={config.data.kind}, and the judge reads shapes alone; use data.kind=shapes")
    if not config.log.evaluate_every:
        raise ValueError("log.evaluate_every=0 leaves no held-out loss to compare; use log.evaluate_every=200")


def trials(study: Study, path: Path) -> Iterator[Trial]:
    """Every training: the variants of one seed before those of the next, so that all meet the same machine."""
    for seed in study.seeds:
        for place, (name, variant) in enumerate(study.variants.items()):
            yield Trial(place, name, seed, path.parent / study.base, (*study.set, *variant.set, f"run.seed={seed}"))
