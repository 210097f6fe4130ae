"""Parameters of the network, in closed form: every one by name, a rank's share, and the sizes of the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import NamedTuple

from megadit.model.config import PAPER_SIZES, PRESETS, ECDiTConfig, TextConfig
from megadit.model.embed import MODULATION_OUTPUTS, TIME_FREQUENCIES
from megadit.model.weights import decays

# The part that a parameter belongs to: that of the first fragment that its name holds.
PARTS = {
    "embed.text.": "text",
    ".pooled_": "text",
    "norm.": "norms",
    ".labels": "classes",
    ".time_": "time",
    "embed.patch.": "patch",
    "head.": "head",
    "modulation.": "modulation",
    "cross_attention.": "cross_attention",
    "attention.": "attention",
    "router.": "router",
    "experts.": "experts",
    "shared.": "shared_experts",
    "feedforward.": "feedforward",
}

# What the paper's sizes imply of its captions: cross-attention reads states of width 1024. Their number is not given.
PAPER_TEXT = TextConfig(kind="precomputed", channels=1024, width=1024, length=128)

# Frozen networks that EC-DiT is trained beside and that the paper's totals include (arXiv 2410.02098): a CLIP-like text
# encoder, and the autoencoder that makes latents of images.
FROZEN_TEXT_ENCODER = 670_000_000
FROZEN_AUTOENCODER = 84_000_000


class Kind(NamedTuple):
    """What decides how ZeRO keeps a parameter: over which axes it is a replica, and whether weight decay applies."""

    is_expert: bool
    decays: bool


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole network: its global name, its shape, and the axes that it is cut over."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        """A field of `Parameters`."""
        return next(part for fragment, part in PARTS.items() if fragment in self.name)

    @property
    def kind(self) -> Kind:
        return Kind("ep" in self.axes, decays(self.name))

    @property
    def count(self) -> int:
        """Its elements."""
        return prod(self.shape)

    def on_rank(self, tp: int, ep: int) -> int:
        """Its elements on one rank, at these degrees of tensor and expert parallelism, which divide them."""
        degrees = {"tp": tp, "ep": ep}
        return self.count // prod(degrees[axis] for axis in self.axes)

    def is_partial(self, sequence: bool) -> bool:
        """Whether each tensor rank has only a part of its gradient: what heads share; with the tokens cut between the
        layers (`sequence`), also what works on those.
        """
        if self.name.endswith(("q_norm.weight", "k_norm.weight")):
            return True
        is_between = self.name.endswith((".table", "router.weight")) or self.name.startswith("head.linear.")
        is_row_bias = self.name.startswith("blocks.") and ".embedder." not in self.name and self.name.endswith(".bias")
        return sequence and not self.axes and (is_between or is_row_bias)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part. text: pooled vectors too; experts: of all of them, routed; head: with its
    modulation.
    """

    patch: int = 0
    time: int = 0
    classes: int = 0
    text: int = 0
    attention: int = 0
    cross_attention: int = 0
    modulation: int = 0
    norms: int = 0
    feedforward: int = 0
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def parameters(weights: Iterable[Weight]) -> Parameters:
    """Whole parameters by part."""
    counts: Counter[str] = Counter()
    for weight in weights:
        counts[weight.part] += weight.count
    return Parameters(**counts)


def on_rank(weights: Iterable[Weight], tp: int, ep: int) -> Counter[Kind]:
    """The elements that one rank holds of each kind, the groups in which ZeRO shards them."""
    counts: Counter[Kind] = Counter()
    for weight in weights:
        counts[weight.kind] += weight.on_rank(tp, ep)
    return counts


def weights_of(config: ECDiTConfig, text: TextConfig, layers: range | None = None) -> list[Weight]:
    """Every parameter of a stage of these layers (None: of the whole network), in the order in which it holds them."""
    layers = range(config.layers) if layers is None else layers
    weights: list[Weight] = []
    if layers.start == 0:
        weights += _first(config, text)
    for layer in layers:
        weights += layer_weights(config, text, layer)
    if layers.stop == config.layers:
        weights += _head(config)
    return weights


def layer_weights(config: ECDiTConfig, text: TextConfig, layer: int) -> list[Weight]:
    """The parameters of one layer."""
    outputs = MODULATION_OUTPUTS[config.modulation]
    weights = [*_modulation("modulation", config, outputs)]
    if config.embedders == "per_layer" and layer > 0:
        weights += [*_labels("embedder", config), *_time("embedder", config.width)]
    weights += _attention("attention", config, config.width)
    if config.conditioning == "text":
        weights += _attention("cross_attention", config, text.width)
    if config.is_moe(layer):
        weights += _moe("feedforward", config)
    else:
        weights += _feedforward("feedforward", config, config.hidden, config.bias)
    return [Weight(f"blocks.{layer}.{weight.name}", weight.shape, weight.axes) for weight in weights]


def _first(config: ECDiTConfig, text: TextConfig) -> Iterator[Weight]:
    """Of the part before the layers."""
    yield from _labels("embed", config)
    yield from _linear("embed.patch", config.channels * config.patch**2, config.width)
    yield from _time("embed", config.width)
    if config.conditioning == "text":
        yield from _projection(text) if text.is_frozen else _encoder(text)
        yield from _pooled(text, config.width)
    if config.modulation == "shared":
        outputs = MODULATION_OUTPUTS["shared"]
        yield from _linear("embed.modulation.linear", config.width, outputs * config.width, cut="columns")


def _head(config: ECDiTConfig) -> Iterator[Weight]:
    yield from _modulation("head.modulation", config, 2)
    yield from _linear("head.linear", config.width, config.output_channels * config.patch**2)


def _linear(name: str, in_width: int, out_width: int, bias: bool = True, cut: str = "") -> Iterator[Weight]:
    """A linear layer: whole, or cut over tp by "columns" (its outputs, the bias too) or "rows" (its inputs)."""
    yield Weight(f"{name}.weight", (out_width, in_width), ("tp",) if cut else ())
    if bias:
        yield Weight(f"{name}.bias", (out_width,), ("tp",) if cut == "columns" else ())


def _time(name: str, width: int) -> Iterator[Weight]:
    yield from _linear(f"{name}.time_in", TIME_FREQUENCIES, width)
    yield from _linear(f"{name}.time_out", width, width)


def _labels(name: str, config: ECDiTConfig) -> Iterator[Weight]:
    if config.conditioning == "class":
        yield Weight(f"{name}.labels", (config.classes + 1, config.width))


def _modulation(name: str, config: ECDiTConfig, outputs: int) -> Iterator[Weight]:
    """Vectors of its own, or a table of what is added to those that all layers share."""
    if config.modulation == "shared":
        yield Weight(f"{name}.table", (outputs, config.width))
    else:
        yield from _linear(f"{name}.linear", config.width, outputs * config.width, cut="columns")


def _attention(name: str, config: ECDiTConfig, context_width: int) -> Iterator[Weight]:
    query, key_value = config.heads * config.head_width, config.kv_heads * config.head_width
    yield from _linear(f"{name}.q", config.width, query, config.bias, "columns")
    yield from _linear(f"{name}.k", context_width, key_value, config.bias, "columns")
    yield from _linear(f"{name}.v", context_width, key_value, config.bias, "columns")
    yield from _linear(f"{name}.out", query, config.width, config.bias, "rows")
    if config.qk_norm:
        yield Weight(f"{name}.q_norm.weight", (config.head_width,))
        yield Weight(f"{name}.k_norm.weight", (config.head_width,))


def _feedforward(name: str, config: ECDiTConfig, hidden: int, bias: bool) -> Iterator[Weight]:
    yield from _linear(f"{name}.up", config.width, hidden, bias, "columns")
    if config.feedforward == "swiglu":
        yield from _linear(f"{name}.gate", config.width, hidden, bias, "columns")
    yield from _linear(f"{name}.down", hidden, config.width, bias, "rows")


def _moe(name: str, config: ECDiTConfig) -> Iterator[Weight]:
    experts, width, hidden = config.experts, config.width, config.expert_hidden
    read = 2 * width if config.router_input == "timestep" else width
    yield Weight(f"{name}.router.weight", (experts, read))
    shapes: dict[str, tuple[int, ...]] = {"up": (width, hidden), "gate": (width, hidden), "down": (hidden, width)}
    if config.bias:
        shapes |= {"up_bias": (hidden,), "down_bias": (width,), "gate_bias": (hidden,)}
    for key, shape in shapes.items():
        if config.feedforward == "swiglu" or not key.startswith("gate"):
            yield Weight(f"{name}.experts.{key}", (experts, *shape), ("ep", "tp"))
    if config.shared_experts:
        yield from _feedforward(f"{name}.shared", config, config.shared_hidden, bias=False)


def _projection(text: TextConfig) -> Iterator[Weight]:
    yield from _linear("embed.text.project_in", text.channels, text.width)
    yield from _linear("embed.text.project_out", text.width, text.width)


def _pooled(text: TextConfig, width: int) -> Iterator[Weight]:
    if text.pooled:
        yield from _linear("embed.pooled_in", text.pooled, width)
        yield from _linear("embed.pooled_out", width, width)


def _encoder(text: TextConfig) -> Iterator[Weight]:
    width = text.width
    yield Weight("embed.text.tokens", (text.vocabulary, width))
    yield Weight("embed.text.positions", (text.length, width))
    for layer in range(text.layers):
        name = f"embed.text.layers.{layer}"
        yield Weight(f"{name}.attention_norm.weight", (width,))
        yield from _linear(f"{name}.qkv", width, 3 * width, bias=False)
        yield from _linear(f"{name}.out", width, width, bias=False)
        yield Weight(f"{name}.feedforward_norm.weight", (width,))
        yield from _linear(f"{name}.up", width, 4 * width, bias=False)
        yield from _linear(f"{name}.down", 4 * width, width, bias=False)
    yield Weight("embed.text.norm.weight", (width,))


@dataclass(frozen=True)
class Frozen:
    """Numbers of parameters that are beside the network, run on data and never trained."""

    text_encoder: int = 0
    autoencoder: int = 0

    @property
    def total(self) -> int:
        return self.text_encoder + self.autoencoder


def frozen_parameters(config: ECDiTConfig, text: TextConfig) -> Frozen:
    """The paper's two frozen networks where captions are a frozen encoder's states (text.kind), else none.

    A configuration does not say whether images are latents, so one rule serves both; nor does it name the encoder, so
    the sizes are always EC-DiT's.
    """
    if config.conditioning == "text" and text.is_frozen:
        return Frozen(FROZEN_TEXT_ENCODER, FROZEN_AUTOENCODER)
    return Frozen()


def activated_parameters(config: ECDiTConfig, text: TextConfig) -> int:
    """The parameters that one token passes on average: of experts only those that compute it, all others whole.

    Experts that choose: capacity_factor of each layer, and at most all. Tokens that choose: top_k, as if none were
    dropped.
    """
    idle = 0.0
    for layer in filter(config.is_moe, range(config.layers)):
        factor = config.top_k if config.routing == "token_choice" else config.capacity_factor_of(layer)
        experts = parameters(layer_weights(config, text, layer)).experts
        idle += experts * (1 - min(1.0, factor / config.experts))
    return parameters(weights_of(config, text)).total - round(idle)


@dataclass(frozen=True)
class Size:
    """How large a model is. `total` and `activated` include what is frozen, as the paper's do."""

    total: int
    activated: int
    frozen: Frozen
    trained: Parameters


def size_of(config: ECDiTConfig, text: TextConfig) -> Size:
    """The numbers that name a model."""
    trained, frozen = parameters(weights_of(config, text)), frozen_parameters(config, text)
    activated = activated_parameters(config, text)
    return Size(trained.total + frozen.total, activated + frozen.total, frozen, trained)


class Residual(NamedTuple):
    """One number of the paper beside ours. ratio: ours / the paper's."""

    name: str
    ours: int
    paper: float
    ratio: float


def residuals() -> list[Residual]:
    """Every size that the paper gives, total and activated, beside ours, with captions as `PAPER_TEXT` has them."""
    found = []
    for preset, (total, activated) in PAPER_SIZES.items():
        size = size_of(ECDiTConfig(preset=preset, **PRESETS[preset]), PAPER_TEXT)
        numbers = {preset: (size.total, total), f"{preset} activated": (size.activated, activated)}
        found += [Residual(name, ours, paper, ours / paper) for name, (ours, paper) in numbers.items() if paper]
    return found
