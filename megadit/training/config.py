"""One run's configuration: frozen dataclasses, each beside what it configures, read from YAML and overrides.

Unknown keys are errors that name the nearest known one. Rules between sections are a list of small predicates, each
with a message that says what to change.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from megadit.data.config import DataConfig
from megadit.diffusion.config import ObjectiveConfig, kept_tokens, shift_of
from megadit.model.config import PRESETS, ROUTING_PRESETS, ECDiTConfig, TextConfig
from megadit.parallel.layout import Fallback, Layout, ParallelConfig
from megadit.runtime.config import WatchdogConfig
from megadit.sampling.config import SampleConfig, check_installed
from megadit.training.guard import GuardConfig
from megadit.zero.config import OptimConfig, ZeroConfig

if TYPE_CHECKING:
    import torch

Dtype = Literal["bfloat16", "float32", "float64"]

CONFIG_FILE = "config.yaml"  # in a run's folder
DTYPES: tuple[Dtype, ...] = typing.get_args(Dtype)


@dataclass(frozen=True)
class RunSection:
    """The run itself."""

    name: str = "run"
    dir: str = ""  # empty: runs/<name>
    seed: int = 0
    steps: int = 1000
    dtype: Dtype = "float32"  # of parameters; ZeRO keeps float32 masters
    compile: bool = False  # torch.compile of each block, as one graph of fixed shapes
    recompute: Literal["none", "block", "moe"] = "none"  # what keeps its inputs only and runs again backward
    deterministic: bool = False  # only kernels that repeat bit for bit; an error names what has none
    init_from: str = ""  # a run, a checkpoint or an export whose weights a new run starts from, with a fresh optimizer
    init_weights: Literal["model", "ema"] = "model"  # of a checkpoint: those that trained, or their average


@dataclass(frozen=True)
class EmaConfig:
    """`decay` is reached gradually: early on the average forgets its start faster."""

    decay: float = 0.999


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every so many steps and at the end; the newest `keep` stay (0: all)."""

    every: int = 500
    keep: int = 2
    keep_every: int = 0  # steps; checkpoints of steps that are a multiple are never removed (0: none is spared)
    async_: bool = False  # written while the training goes on, from a copy in host memory


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written; these say how often the held-out split is looked at and pictures are drawn."""

    every: int = 10  # steps between looks at the device, which wait for it; metrics.jsonl has every step all the same
    evaluate_every: int = 500  # steps; 0: never
    sample_every: int = 500  # steps; 0: never
    samples: int = 40
    sample_ids: bool = False  # of each step, in metrics.jsonl: the places in the run's order of all that it trained on
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
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return Path(self.run.dir or f"runs/{self.run.name}").expanduser()

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.run.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as YAML and JSON take them."""
        plain = {
            section: {key_of(name): value for name, value in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }
        plain["optim"]["betas"] = list(plain["optim"]["betas"])
        plain["data"] |= {key: list(plain["data"][key]) for key in ("tasks", "shapes")}
        plain["parallel"]["fallbacks"] = [
            {key: value for key, value in other.items() if value is not None}
            for other in plain["parallel"]["fallbacks"]
        ]
        overrides = plain["model"]["capacity_overrides"]
        plain["model"]["capacity_overrides"] = {str(layer): factor for layer, factor in overrides.items()}  # as in JSON
        return plain

    def to_yaml(self) -> str:
        """Presets expanded and defaults written out, as `load_config` reads it back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


# Values that older versions had other names for, by section and key.
RENAMED = {("text", "kind"): {"states": "precomputed"}}

SECTIONS: dict[str, type] = typing.get_type_hints(RunConfig)


def key_of(field_name: str) -> str:
    """The key that sets a field. A field cannot have the name of a Python keyword; it has an underscore more.

    >>> key_of("keep"), key_of("async_")
    ('keep', 'async')
    """
    return field_name.removesuffix("_")


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
        fields = {key_of(f.name): f.name for f in dataclasses.fields(SECTIONS[section])}
        for key in values:
            check_known(key, fields, "key", prefix=f"{section}.")
        expanded[section] = {fields[key]: value for key, value in _renewed(section, values).items()}
    others = expanded.get("parallel", {}).get("fallbacks")
    for i, other in enumerate(others if isinstance(others, list) else []):
        for key in other if isinstance(other, Mapping) else {}:
            check_known(key, [f.name for f in dataclasses.fields(Fallback)], "key", f"parallel.fallbacks[{i}].")
    preset = expanded.get("model", {}).get("preset") or ""
    if preset:
        check_known(preset, PRESETS, "model.preset")
    routing_preset = expanded.get("model", {}).get("routing_preset") or ""
    if routing_preset:
        check_known(routing_preset, ROUTING_PRESETS, "model.routing_preset")
    if preset or routing_preset:
        named = {**PRESETS.get(preset, {}), **ROUTING_PRESETS.get(routing_preset, {})}
        expanded["model"] = {**named, **expanded["model"]}
    try:
        return TypeAdapter(RunConfig).validate_python(expanded)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(key_of(str(part)) for part in first["loc"])
        raise ValueError(f"{source}: {key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def check_known(name: object, known: Sequence[str] | Mapping[str, Any], what: str, prefix: str = "") -> None:
    """Raises ValueError naming the nearest known name."""
    if isinstance(name, str) and name in known:
        return
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)
    raise ValueError(f"unknown {what} {prefix}{name}; the nearest is {prefix}{nearest[0]}")


def _renewed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A section's values under their names of today."""

    def renewed(key: str, value: Any) -> Any:
        names = RENAMED.get((section, key), {})
        return names.get(value, value) if isinstance(value, str) else value

    return {key: renewed(key, value) for key, value in values.items()}


def differing(section: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What to say of each key of a section whose value is another one now."""
    # An older version had by default what it did not know.
    before = RunConfig().to_dict()[section] | _renewed(section, before)
    return [f"{section}.{key}={before[key]} is now {now[key]}" for key in now if before[key] != now[key]]


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
            lines.append(f"  {section}.{key_of(known.name)}={default}".ljust(36) + choices)
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
    if model.has_experts:
        cut["model.experts"] = model.experts
    if model.has_experts and model.shared_experts:
        cut["the shared experts' hidden width"] = model.shared_hidden
    if not all(model.is_moe(layer) for layer in range(model.layers)):
        cut["the hidden width model.ffn_ratio x model.width"] = model.hidden
    if config.parallel.sequence:
        cut["the tokens of an image (model.image_size / model.patch)^2"] = model.tokens
        if training_tokens(config) < model.tokens:
            cut["the tokens kept in training (objective.keep_tokens)"] = training_tokens(config)
    return cut


def tensor_divides(config: RunConfig, world_size: int) -> Iterator[str]:
    degree, cut = config.parallel.tensor, _cut_by_tensor(config)
    wrong = [f"{key}={size}" for key, size in cut.items() if size % degree]
    if wrong:
        allowed = [d for d in range(1, max(cut.values()) + 1) if all(size % d == 0 for size in cut.values())]
        yield f"parallel.tensor={degree} does not divide {' and '.join(wrong)}; use {_join(allowed)}"


def experts_divide(config: RunConfig, world_size: int) -> Iterator[str]:
    experts, tensor, expert = config.model.experts, config.parallel.tensor, config.parallel.expert
    if not config.model.has_experts:
        if expert > 1:
            why = "model.experts=0" if experts == 0 else "model.routing, model.moe_every, model.dense_first"
            yield f"parallel.expert={expert}, but the model is dense ({why}); use parallel.expert=1"
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
    if config.model.positions == "rotary" and config.model.head_width % 4:
        yield (
            f"model.head_width={config.model.head_width} is not a multiple of 4, which model.positions=rotary needs: "
            "pairs of features for the row and for the column; change it, or use model.positions=sincos"
        )


def captions_fit(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.text.length < 3:
        yield f"text.length={config.text.length} has no room between a caption's begin and end; use 3 or more"
    if config.text.init_std <= 0:
        yield f"text.init_std={config.text.init_std} is the spread of the tokens' embeddings; use a number above 0"


def layers_fill_stages(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.layers
    num_stages = parallel.pipeline * parallel.stages_on_rank
    if num_stages > layers:
        turns = "" if parallel.stages_on_rank == 1 else f" x {parallel.stages_on_rank} stages per rank"
        allowed = layers // parallel.stages_on_rank
        change = f"use at most {allowed}" if allowed else "use parallel.schedule=1f1b"
        yield (f"parallel.pipeline={parallel.pipeline}{turns} cannot be filled by model.layers={layers}; {change}")


def schedule_composes(config: RunConfig, world_size: int) -> Iterator[str]:
    """zbv runs the backward pass in two halves, for inputs and for weights."""
    if config.parallel.schedule != "zbv":
        return
    other = "use parallel.schedule=1f1b or interleaved"
    if config.run.recompute != "none":
        yield (
            f"run.recompute={config.run.recompute} would run again for each half of zbv's backward pass; use "
            f"run.recompute=none, or {other}"
        )
    if config.zero.stage == 2:
        yield f"zero.stage=2 is not proven under zbv, whose backward pass is split; use zero.stage=1, or {other}"
    if config.run.compile:
        yield f"run.compile=true cannot split the backward pass as zbv does; use run.compile=false, or {other}"


def routing_makes_sense(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    if not model.has_experts:
        return
    if model.routing == "expert_choice":
        for key, value in {"dropless": model.dropless, "balance_loss": model.balance_loss}.items():
            if value:
                yield (
                    f"model.{key}={value} is for token choice: experts that choose are balanced and drop nothing; "
                    f"leave it out, or set model.routing=token_choice"
                )
    elif model.top_k > model.experts:
        yield f"model.top_k={model.top_k} asks for more experts than model.experts={model.experts}; use at most that"
    if model.normalise_gates and model.gate == "identity":
        yield (
            "model.normalise_gates=true divides by a token's sum of gates, which identity gates may bring to zero; use "
            "model.gate=softmax or sigmoid"
        )
    for layer, factor in model.capacity_overrides.items():
        if not (0 <= layer < model.layers and model.is_moe(layer)):
            has = _join([number for number in range(model.layers) if model.is_moe(number)])
            yield f"model.capacity_overrides names layer {layer}, which has no experts; layers with experts: {has}"
        if not 0 < factor < math.inf:
            yield f"model.capacity_overrides[{layer}]={factor} must be more than 0"
    if config.run.compile and model.routing == "token_choice" and model.dropless:
        yield "run.compile=true needs fixed shapes; use model.dropless=false, or run.compile=false"


def conditioning_is_given(config: RunConfig, world_size: int) -> Iterator[str]:
    conditioning, classes = config.model.conditioning, config.model.classes
    if conditioning == "class" and classes < 1:
        yield f"model.conditioning=class needs model.classes, the number of classes; it is {classes}"
    if config.model.modulation == "shared" and config.model.embedders == "per_layer":
        yield (
            "model.modulation=shared reads one conditioning, which model.embedders=per_layer has in every layer; use "
            "model.embedders=shared"
        )


def pooled_has_a_source(config: RunConfig, world_size: int) -> Iterator[str]:
    text = config.text
    if config.model.conditioning != "text" or not text.pooled:
        return
    if text.kind in ("builtin", "t5"):
        yield (
            f"text.pooled={text.pooled} is the width of CLIP's vector of a caption, which text.kind={text.kind} does "
            "not have; use text.pooled=0, or text.kind=clip, t5+clip or precomputed"
        )
    if config.model.embedders == "per_layer":
        yield (
            f"text.pooled={text.pooled} joins the one conditioning of all layers, and model.embedders=per_layer has "
            "one in every layer; use model.embedders=shared, or text.pooled=0"
        )


def data_is_named(config: RunConfig, world_size: int) -> Iterator[str]:
    data = config.data
    if data.kind not in ("shards", "images"):
        if data.sets:
            yield f"data.sets names encoded data sets, which data.kind={data.kind} does not read; use data.kind=shards"
        return
    if data.kind == "images":
        if not data.path or data.sets:
            yield "data.kind=images encodes data.path, a folder, tar or parquet file; set it, and no data.sets"
        if config.text.too_long == "error" and config.model.conditioning == "text":
            yield "text.too_long=error is not heeded by data.kind=images, which cuts captions and counts them; use cut"
        if not data.autoencoder:
            yield "data.kind=images needs data.autoencoder: name a folder or a model on the Hub"
        if config.text.kind == "precomputed" and config.model.conditioning == "text":
            yield "text.kind=precomputed names no encoder for data.kind=images; use text.kind=t5, clip or t5+clip"
    elif bool(data.path) == bool(data.sets):
        yield "data.kind=shards reads one data set, data.path, or several with weights, data.sets; set one of the two"
    if data.heldout == 1:
        yield "data.heldout=1 holds every sample out; use 2 or more, or 0 for none"
    if not data.heldout and config.log.evaluate_every:
        yield "data.heldout=0 leaves nothing to evaluate; use log.evaluate_every=0, or hold samples out"
    if config.model.conditioning == "text" and not config.text.is_frozen:
        yield (
            f"text.kind=builtin reads text, and data.kind={data.kind} has states of frozen encoders; use text.kind=t5, "
            "clip, t5+clip, or precomputed for whatever they are of"
        )


def images_per_group(config: RunConfig) -> int:
    """Images whose tokens are routed together: consecutive ones of a microbatch."""
    group = config.model.routing_group
    if group == "sample" or not config.model.has_experts:
        return 1
    return config.data.micro_batch if group == "batch" else group


def sampling_of(config: RunConfig, settings: SampleConfig, size: tuple[int, int]) -> SampleConfig:
    """What draws images of (height, width) with these settings: their shift is that of so many tokens."""
    shift = shift_of(settings.shift, config.model.tokens_of(size), config.objective.shift_tokens)
    return replace(settings, shift=shift)


def training_tokens(config: RunConfig, size: tuple[int, int] | None = None) -> int:
    """Tokens that the network sees in training of an image of (height, width); None: a square of `model.image_size`."""
    tokens = config.model.tokens if size is None else config.model.tokens_of(size)
    return kept_tokens(tokens, config.objective.keep_tokens)


def check_sizes(config: RunConfig, sizes: Iterable[tuple[int, int]]) -> None:
    """Raises ValueError for latent images (height, width) that cannot be cut into patches and over ranks."""
    model, parallel = config.model, config.parallel
    for height, width in sizes:
        if height % model.patch or width % model.patch:
            raise ValueError(
                f"latent images of {height} x {width} cannot be cut into patches of model.patch={model.patch}; encode "
                "the data set at sizes that can, or change model.patch"
            )
        counts = {
            "tokens": model.tokens_of((height, width)),
            "tokens kept in training (objective.keep_tokens)": training_tokens(config, (height, width)),
        }
        for what, count in counts.items():
            if parallel.sequence and count % parallel.tensor:
                raise ValueError(
                    f"latent images of {height} x {width} have {count} {what}, which parallel.tensor={parallel.tensor} "
                    "does not divide; use parallel.sequence=false, or another size or fraction"
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
        return
    count = num_microbatches(config, layout)
    if count < layout.pp:
        local = data.global_batch // layout.dp
        allowed = [size for size in range(1, local + 1) if local % size == 0 and local // size >= layout.pp]
        change = f"use data.micro_batch={_join(allowed)}" if allowed else "raise data.global_batch"
        yield (
            f"data.micro_batch={data.micro_batch} makes {count} microbatches for "
            f"parallel.pipeline={layout.pp} stages, which need at least one each; {change}"
        )
    elif config.parallel.schedule == "interleaved" and count % max(1, count // layout.pp):
        yield (
            f"parallel.schedule=interleaved goes through {count} microbatches in {count // layout.pp} equal rounds, "
            f"which {count} is not a multiple of; change data.micro_batch or data.global_batch, a multiple of "
            f"{layout.pp} microbatches always fits"
        )


def groups_fill_microbatches(config: RunConfig, world_size: int) -> Iterator[str]:
    layout, group = Layout.of(config.parallel, world_size), config.model.routing_group
    if not config.model.has_experts:
        return
    micro_batch = config.data.global_batch // (layout.dp * num_microbatches(config, layout))
    if group == "batch" and not config.data.micro_batch:
        yield (
            "model.routing_group=batch lets the images of a microbatch compete, so its size is part of the model and "
            f"must not follow the layout; set data.micro_batch, which would be {micro_batch} here"
        )
    elif isinstance(group, int) and micro_batch % group:
        allowed = [size for size in range(1, micro_batch + 1) if micro_batch % size == 0]
        yield (
            f"model.routing_group={group} does not divide the {micro_batch} images of a microbatch; use "
            f"{_join(allowed)}, or set data.micro_batch to a multiple of {group}"
        )


def zero_keeps_precision(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.zero.stage > 0 and config.run.dtype == "float64":
        yield f"zero.stage={config.zero.stage} keeps float32 masters; use zero.stage=0 with run.dtype=float64"
    if config.zero.stage == 0 and config.run.dtype == "bfloat16":
        yield "run.dtype=bfloat16 needs the float32 masters of ZeRO: small updates would be lost; use zero.stage=1"


# What must be more than 0, and what may also be 0.
POSITIVE = {
    "run": ("steps",),
    "model": ("layers", "width", "heads", "kv_heads", "head_width", "ffn_ratio", "moe_every", "capacity_factor",
              "image_size", "channels", "patch", "route_scale", "top_k", "position_interpolation",
              "attention_norm_eps", "feedforward_norm_eps"),
    "text": ("vocabulary", "width", "heads", "channels"),
    "parallel": ("tensor", "pipeline", "expert", "stages_per_rank"),
    "data": ("global_batch", "threads", "resolution"),
    "objective": ("shift",),
    "optim": ("eps",),
    "sample": ("steps", "shift"),
    "checkpoint": ("every",),
    "log": ("samples", "every"),
    "guard": ("window",),
    "watchdog": ("startup", "silent"),
}  # fmt: skip
NOT_NEGATIVE = {
    "model": (
        "experts",
        "expert_ratio",
        "dense_first",
        "shared_experts",
        "shared_ratio",
        "balance_loss",
        "classes",
        "out_channels",
    ),
    "text": ("layers", "pooled"),
    "data": ("micro_batch", "heldout", "ahead"),
    "objective": ("logit_std", "shift_tokens"),
    "optim": ("lr", "weight_decay", "clip", "warmup"),
    "sample": ("guidance",),
    "checkpoint": ("keep", "keep_every"),
    "log": ("evaluate_every", "sample_every"),
    "guard": ("max_skips", "spike", "max_rewinds", "checksum_every", "time_limit"),
    "watchdog": ("hang",),
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
    group = config.model.routing_group
    if isinstance(group, int) and group < 1:
        yield f"model.routing_group={group} must be sample, batch, or a number of images of at least 1"
    if not 0 < config.objective.keep_tokens <= 1:
        yield f"objective.keep_tokens={config.objective.keep_tokens} must be more than 0 and at most 1"
    if not 0 <= config.objective.caption_dropout <= 1:
        yield f"objective.caption_dropout={config.objective.caption_dropout} must be between 0 and 1"
    sample = config.sample
    if not 0 <= sample.guidance_rescale <= 1:
        yield f"sample.guidance_rescale={sample.guidance_rescale} must be between 0 and 1"
    if not 0 <= sample.guidance_from < sample.guidance_until <= 1:
        yield (
            f"sample.guidance_from={sample.guidance_from} and sample.guidance_until={sample.guidance_until} must be "
            "times between 0, the image, and 1, the noise, the first of them lower; sample.guidance=1 is no guidance"
        )


def spikes_leave_a_way_back(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.guard.spike > 0 and config.checkpoint.keep == 1:
        yield (
            "guard.spike goes back to a checkpoint before the spike, and checkpoint.keep=1 keeps the newest one alone; "
            "use checkpoint.keep=2 or more, or 0 for all"
        )


# The first rule that finds a fault is the one reported: later ones may assume that earlier ones hold.
RULES: tuple[tuple[Rule, ...], ...] = (
    (numbers_make_sense,),
    (
        tensor_divides,
        experts_divide,
        heads_share,
        patches_fit,
        captions_fit,
        layers_fill_stages,
        schedule_composes,
        routing_makes_sense,
        conditioning_is_given,
        pooled_has_a_source,
        data_is_named,
        zero_keeps_precision,
        spikes_leave_a_way_back,
    ),
    (batch_divides,),
    (groups_fill_microbatches,),
)


def fit(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with the first layout, of `parallel` and then `parallel.fallbacks`, that keeps every rule.

    Raises ValueError with the faults of each where none does.
    """
    faults = []
    for parallel in (config.parallel, *config.parallel.layouts()):
        candidate = replace(config, parallel=parallel)
        try:
            check(candidate, world_size)
        except ValueError as error:
            faults.append(str(error))
        else:
            return candidate
    first, *others = faults
    raise ValueError("; ".join([first, *(f"parallel.fallbacks[{i}]: {fault}" for i, fault in enumerate(others))]))


def check(config: RunConfig, world_size: int) -> Layout:
    """The layout, once every rule holds. Raises ValueError with all the faults of the first round that has any."""
    for rules in RULES:
        faults = [message for rule in rules for message in rule(config, world_size)]
        if faults:
            raise ValueError("; ".join(faults))
    return Layout.of(config.parallel, world_size)


def check_inputs(config: RunConfig) -> None:
    """Raises ValueError for a network that can be converted, but not yet trained or drawn from."""
    check_installed(config.sample.sampler)
    model, faults = config.model, []
    if model.conditioning == "text" and config.text.is_frozen and config.data.kind not in ("shards", "images"):
        faults.append(
            f"text.kind={config.text.kind} reads a frozen text encoder's states, which data.kind={config.data.kind} "
            "does not have; use data.kind=shards, or text.kind=builtin"
        )
    if model.output_channels != model.channels:
        faults.append(
            f"model.out_channels={model.out_channels} is not model.channels={model.channels}, and a velocity has as "
            "many channels as its image; use model.out_channels=0"
        )
    if faults:
        raise ValueError("; ".join(faults))


def load_checked(path: str | Path, overrides: Sequence[str], world_size: int) -> tuple[RunConfig, RunConfig]:
    """(the configuration as it was asked for, the same with the layout that fits), of which every rule holds.

    Raises ValueError as `load_config`, `fit` and `check_inputs` do.
    """
    asked = load_config(path, overrides)
    config = fit(asked, world_size)
    check_inputs(config)
    return asked, config
