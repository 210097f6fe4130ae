"""One run's configuration: frozen dataclasses, each beside what it configures, read from YAML and overrides.

Unknown keys are errors that name the nearest known one. Rules between sections are a list of small predicates, each
with a message that says what to change.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from megadit.data.loader import DataConfig
from megadit.diffusion.objective import ObjectiveConfig
from megadit.model.config import PRESETS, ECDiTConfig
from megadit.model.text import TextConfig
from megadit.parallel.grid import Layout, ParallelConfig
from megadit.sampling.generate import SampleConfig
from megadit.training.ema import EmaConfig
from megadit.zero import OptimConfig, ZeroConfig

CONFIG_FILE = "config.yaml"  # in a run's folder
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class RunSection:
    """The run itself."""

    name: str = "run"
    dir: str = ""  # empty: runs/<name>
    seed: int = 0
    steps: int = 1000
    dtype: Literal["float32", "float64"] = "float32"
    compile: bool = False  # torch.compile of each block, as one graph of fixed shapes
    recompute: Literal["none", "block"] = "none"  # block: keep each block's inputs only and run it again backward


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every so many steps and at the end; the newest `keep` stay (0: all)."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written; these say how often the held-out split is looked at and pictures are drawn."""

    evaluate_every: int = 500  # steps; 0: never
    sample_every: int = 500  # steps; 0: never
    samples: int = 40
    tensorboard: bool = True


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run."""

    run: RunSection = field(default_factory=RunSection)
    model: ECDiTConfig = field(default_factory=ECDiTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return Path(self.run.dir or f"runs/{self.run.name}").expanduser()

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.run.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as YAML and JSON take them."""
        plain = dataclasses.asdict(self)
        plain["optim"]["betas"] = list(plain["optim"]["betas"])
        return plain

    def to_yaml(self) -> str:
        """Presets expanded and defaults written out, as `load_config` reads it back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


SECTIONS: dict[str, type] = typing.get_type_hints(RunConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file with `section.key=value` overrides on top.

    Raises ValueError, with the file or the key and what to change, for a file that cannot be read, an unknown
    section or key, and a value of the wrong type.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"config {path}: expected sections ({', '.join(SECTIONS)}), found {type(raw).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        check_known(section, SECTIONS, "section")
        try:
            raw[section] = {**_keys(raw, section, str(path)), name: yaml.safe_load(value) if value else ""}
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML") from error
    return parse(raw, str(path))


def _keys(raw: Mapping[str, Any], section: str, source: str) -> Mapping[str, Any]:
    values = raw.get(section) or {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: section {section} must hold keys, found {values!r}")
    return values


def parse(raw: Mapping[str, Any], source: str) -> RunConfig:
    """A RunConfig from nested plain data; `source` names it in errors. Raises ValueError."""
    expanded = {}
    for section in raw:
        check_known(section, SECTIONS, "section")
        values = _keys(raw, section, source)
        fields = [f.name for f in dataclasses.fields(SECTIONS[section])]
        for key in values:
            check_known(key, fields, "key", prefix=f"{section}.")
        expanded[section] = dict(values)
    preset = expanded.get("model", {}).get("preset")
    if preset:
        check_known(preset, PRESETS, "model.preset")
        expanded["model"] = {**PRESETS[preset], **expanded["model"]}
    try:
        return TypeAdapter(RunConfig).validate_python(expanded)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{source}: {key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def check_known(name: object, known: Sequence[str] | Mapping[str, Any], what: str, prefix: str = "") -> None:
    """Raises ValueError naming the nearest known name."""
    if isinstance(name, str) and name in known:
        return
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)
    raise ValueError(f"unknown {what} {prefix}{name}; the nearest is {prefix}{nearest[0]}")


def describe() -> str:
    """Every section and key, with its default and its choices: the body of --help."""
    lines = []
    for section, kind in SECTIONS.items():
        lines += ["", f"{section}: {(kind.__doc__ or '').splitlines()[0]}"]
        hints = typing.get_type_hints(kind)
        for known in dataclasses.fields(kind):
            default = yaml.safe_dump(getattr(kind(), known.name), default_flow_style=True).splitlines()[0]
            is_choice = typing.get_origin(hints[known.name]) is Literal
            choices = " | ".join(str(choice) for choice in typing.get_args(hints[known.name])) if is_choice else ""
            lines.append(f"  {section}.{known.name}={default}".ljust(36) + choices)
    return "\n".join(line.rstrip() for line in lines)


# --- rules between sections -------------------------------------------------------------------------------------------
# Each takes the configuration and the number of processes and yields a message for each fault, saying what to change.

Rule = Callable[[RunConfig, int], Iterator[str]]


def _join(values: Sequence[int]) -> str:
    """1, 2 or 4."""
    head, last = [str(value) for value in values[:-1]], str(values[-1])
    return f"{', '.join(head)} or {last}" if head else last


def _cut_by_tensor(config: RunConfig) -> dict[str, int]:
    """What the tensor degree must divide, by the name of its key."""
    model = config.model
    cut = {"model.heads": model.heads, "model.kv_heads": model.kv_heads, "model.width": model.width}
    if model.experts:
        cut["model.experts"] = model.experts
    if config.parallel.sequence:
        cut["the tokens of an image (model.image_size / model.patch)^2"] = model.tokens
    return cut


def tensor_divides(config: RunConfig, world_size: int) -> Iterator[str]:
    degree, cut = config.parallel.tensor, _cut_by_tensor(config)
    wrong = [f"{key}={size}" for key, size in cut.items() if size % degree]
    if wrong:
        allowed = [d for d in range(1, max(cut.values()) + 1) if all(size % d == 0 for size in cut.values())]
        yield f"parallel.tensor={degree} does not divide {' and '.join(wrong)}; use {_join(allowed)}"


def experts_divide(config: RunConfig, world_size: int) -> Iterator[str]:
    experts, tensor, expert = config.model.experts, config.parallel.tensor, config.parallel.expert
    if experts == 0 and expert > 1:
        yield f"parallel.expert={expert}, but the model is dense (model.experts=0); use parallel.expert=1"
    elif experts % tensor == 0 and experts % (tensor * expert):
        allowed = [d for d in range(1, experts + 1) if experts % (tensor * d) == 0]
        yield (
            f"parallel.expert={expert} times parallel.tensor={tensor} does not divide model.experts={experts}; "
            f"use parallel.expert={_join(allowed)}"
        )


def heads_share(config: RunConfig, world_size: int) -> Iterator[str]:
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if heads % kv_heads:
        allowed = [d for d in range(1, heads + 1) if heads % d == 0]
        yield f"model.kv_heads={kv_heads} does not divide model.heads={heads}; use {_join(allowed)}"
    if config.text.width % config.text.heads:
        allowed = [d for d in range(1, 65) if config.text.width % d == 0]
        yield f"text.heads={config.text.heads} does not divide text.width={config.text.width}; use {_join(allowed)}"


def patches_fit(config: RunConfig, world_size: int) -> Iterator[str]:
    size, patch = config.model.image_size, config.model.patch
    if size % patch:
        allowed = [d for d in range(1, size + 1) if size % d == 0]
        yield f"model.patch={patch} does not divide model.image_size={size}; use {_join(allowed)}"
    if config.model.width % 4:
        yield f"model.width={config.model.width} is not a multiple of 4, which 2-D positions need"


def captions_fit(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.text.length < 3:
        yield f"text.length={config.text.length} has no room between a caption's begin and end; use 3 or more"


def layers_fill_stages(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.parallel.pipeline > config.model.layers:
        yield (
            f"parallel.pipeline={config.parallel.pipeline} stages cannot be filled by model.layers="
            f"{config.model.layers}; use at most {config.model.layers}"
        )


def num_microbatches(config: RunConfig, layout: Layout) -> int:
    """Forward passes of one rank in one optimizer step; by default one for each pipeline stage."""
    return config.data.global_batch // (layout.dp * config.data.micro_batch) if config.data.micro_batch else layout.pp


def batch_divides(config: RunConfig, world_size: int) -> Iterator[str]:
    layout, data = Layout.of(config.parallel, world_size), config.data
    per_pass = layout.dp * (data.micro_batch or layout.pp)
    if data.global_batch % per_pass:
        nearest = max(1, round(data.global_batch / per_pass)) * per_pass
        one_pass = f"data.micro_batch={data.micro_batch}" if data.micro_batch else f"{layout.pp} pipeline stages"
        yield (
            f"data.global_batch={data.global_batch} is not a multiple of {layout.dp} data-parallel ranks x "
            f"{one_pass}; the nearest that is: {nearest}"
        )
    elif num_microbatches(config, layout) < layout.pp:
        local = data.global_batch // layout.dp
        allowed = [size for size in range(1, local + 1) if local % size == 0 and local // size >= layout.pp]
        change = f"use data.micro_batch={_join(allowed)}" if allowed else "raise data.global_batch"
        yield (
            f"data.micro_batch={data.micro_batch} makes {num_microbatches(config, layout)} microbatches for "
            f"parallel.pipeline={layout.pp} stages, which need at least one each; {change}"
        )


def zero_keeps_precision(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.zero.stage > 0 and config.run.dtype == "float64":
        yield f"zero.stage={config.zero.stage} keeps float32 masters; use zero.stage=0 with run.dtype=float64"


# What must be more than 0, and what may also be 0.
POSITIVE = {
    "run": ("steps",),
    "model": ("layers", "width", "heads", "kv_heads", "head_width", "ffn_ratio", "moe_every", "capacity_factor",
              "image_size", "channels", "patch"),
    "text": ("vocabulary", "width", "heads"),
    "parallel": ("tensor", "pipeline", "expert"),
    "data": ("global_batch",),
    "objective": ("shift",),
    "optim": ("eps",),
    "sample": ("steps", "shift"),
    "checkpoint": ("every",),
    "log": ("samples",),
}  # fmt: skip
NOT_NEGATIVE = {
    "model": ("experts",),
    "text": ("layers",),
    "data": ("micro_batch",),
    "objective": ("logit_std",),
    "optim": ("lr", "weight_decay", "clip", "warmup"),
    "sample": ("guidance",),
    "checkpoint": ("keep",),
    "log": ("evaluate_every", "sample_every"),
}


def numbers_make_sense(config: RunConfig, world_size: int) -> Iterator[str]:
    for keys, wanted, holds in (
        (POSITIVE, "more than 0", lambda value: 0 < value < math.inf),
        (NOT_NEGATIVE, "0 or more", lambda value: 0 <= value < math.inf),
    ):
        for section, names in keys.items():
            for name in names:
                value = getattr(getattr(config, section), name)
                if not holds(value):  # NaN too
                    yield f"{section}.{name}={value} must be {wanted}"
    fractions = {
        "ema.decay": config.ema.decay,
        "optim.betas[0]": config.optim.betas[0],
        "optim.betas[1]": config.optim.betas[1],
    }
    for name, value in fractions.items():
        if not 0 <= value < 1:
            yield f"{name}={value} must be at least 0 and less than 1"
    if not 0 <= config.objective.caption_dropout <= 1:
        yield f"objective.caption_dropout={config.objective.caption_dropout} must be between 0 and 1"


# The first rule that finds a fault is the one reported: later ones may assume that earlier ones hold.
RULES: tuple[tuple[Rule, ...], ...] = (
    (numbers_make_sense,),
    (tensor_divides, experts_divide, heads_share, patches_fit, captions_fit, layers_fill_stages, zero_keeps_precision),
    (batch_divides,),
)


def check(config: RunConfig, world_size: int) -> Layout:
    """The layout, once every rule holds. Raises ValueError with all the faults of the first round that has any."""
    for rules in RULES:
        faults = [message for rule in rules for message in rule(config, world_size)]
        if faults:
            raise ValueError("; ".join(faults))
    return Layout.of(config.parallel, world_size)
