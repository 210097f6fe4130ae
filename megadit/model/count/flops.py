"""Floating-point operations of the network, in closed form: what throughput and the balance of stages are reckoned in.

Only matrix products count, two operations per multiply-add, as torch's FlopCounterMode counts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megadit.model.config import ECDiTConfig, TextConfig
from megadit.model.ecdit import Recompute
from megadit.model.embed import MODULATION_OUTPUTS, TIME_FREQUENCIES


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind, for some images.

    part: a field of `Parameters`, or "attention_scores" or "cross_attention_scores". gradients: of how many of its two
    operands a gradient is wanted. again: the values of `recompute` that run it again. is_scores: half of it is q k^T,
    whose result fused attention does not keep.
    """

    part: str
    multiply_adds: int
    gradients: int = 2
    again: tuple[Recompute, ...] = ()
    is_scores: bool = False


@dataclass(frozen=True)
class Flops:
    """Operations of the forward pass, of the gradients, and of what the backward pass runs again."""

    forward: int = 0
    backward: int = 0
    again: int = 0

    @property
    def total(self) -> int:
        """Of a training step."""
        return self.forward + self.backward + self.again

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.again + other.again)


def flops_by_part(products: Iterable[Product], recompute: Recompute = "none", fused: bool = True) -> dict[str, Flops]:
    """Operations by part. fused: attention kernels that compute q k^T again in the backward pass (arXiv 2205.14135),
    as all but the plain one of torch do; the gradients are then five products of which `again` has one.
    """
    parts: dict[str, Flops] = {}
    for product in products:
        forward = 2 * product.multiply_adds
        again = forward if recompute in product.again else 0
        if fused and product.is_scores:
            again += product.multiply_adds  # half of the forward's operations
        flops = Flops(forward, product.gradients * forward, again)
        parts[product.part] = parts.get(product.part, Flops()) + flops
    return parts


def flops_of(products: Iterable[Product], recompute: Recompute = "none", fused: bool = True) -> Flops:
    """Operations of them all; see `flops_by_part`."""
    return sum(flops_by_part(products, recompute, fused).values(), Flops())


def products_of(
    config: ECDiTConfig, text: TextConfig, images: int, layers: range | None = None, tokens: int | None = None
) -> list[Product]:
    """The products of a stage of these layers (None: of the whole network) for so many images.

    tokens: that the network sees of each; None: all of a square of `image_size`, here and below. Capacity is that of
    full routing groups, so `images` is a multiple of a group's.
    """
    tokens = config.tokens if tokens is None else tokens
    layers = range(config.layers) if layers is None else layers
    products = _first(config, text, images, tokens) if layers.start == 0 else []
    for layer in layers:
        products += layer_products(config, text, layer, images, tokens)
    return products + (_head(config, images, tokens) if layers.stop == config.layers else [])


def layer_products(
    config: ECDiTConfig, text: TextConfig, layer: int, images: int, tokens: int | None = None
) -> list[Product]:
    """The products of one layer for so many images.

    Recomputation ends with the last tensor that some gradient reads, and none reads what a block, or a mixture of
    experts, puts out. So the last product runs again only where a gate follows.
    """
    tokens = config.tokens if tokens is None else tokens
    rows, width = images * tokens, config.width
    query, key_value = config.heads * config.head_width, config.kv_heads * config.head_width
    products = [
        Product("attention", rows * width * (2 * query + 2 * key_value), again=("block",)),
        Product("attention_scores", 2 * rows * tokens * query, again=("block",), is_scores=True),
    ]
    if config.conditioning == "text":
        projections = 2 * rows * width * query + 2 * images * text.length * text.width * key_value
        products += [
            Product("cross_attention", projections, again=("block",)),
            Product("cross_attention_scores", 2 * rows * text.length * query, again=("block",), is_scores=True),
        ]
    if config.modulation != "shared":
        outputs = MODULATION_OUTPUTS[config.modulation]
        products.append(Product("modulation", images * outputs * width * width, again=("block",)))
    if config.embedders == "per_layer" and layer > 0:
        products += _time(config, images)  # not recomputed: it is outside of the block
    return products + (_moe(config, layer, images, tokens) if config.is_moe(layer) else _dense(config, images, tokens))


def _has_gates(config: ECDiTConfig) -> bool:
    return config.modulation != "scale_shift"


def _dense(config: ECDiTConfig, images: int, tokens: int) -> list[Product]:
    return _feedforward(
        "feedforward",
        config,
        images * tokens * config.width * config.hidden,
        again=("block",),
        last_again=("block",) if _has_gates(config) else (),
    )


def _feedforward(
    part: str, config: ECDiTConfig, matrix: int, again: tuple[Recompute, ...], last_again: tuple[Recompute, ...]
) -> list[Product]:
    """Of a feed-forward network, whose matrices take `matrix` multiply-adds each."""
    inner = 2 if config.feedforward == "swiglu" else 1
    return [Product(part, inner * matrix, again=again), Product(part, matrix, again=last_again)]


def _moe(config: ECDiTConfig, layer: int, images: int, tokens: int) -> list[Product]:
    """Of a mixture of experts; with a capacity, of full experts."""
    rows, width = images * tokens, config.width
    both: tuple[Recompute, ...] = ("block", "moe")
    if config.routing == "token_choice" and config.dropless:
        picks = rows * config.top_k
    else:
        groups, rest = divmod(images, config.group_images)
        assert rest == 0, f"{images} images do not fill routing groups of {config.group_images}"
        picks = groups * config.experts * config.capacity(layer, tokens * config.group_images)
    readings = rows + images if config.router_input == "timestep" else rows
    products = [Product("router", readings * width * config.experts, again=both)]
    # The gates of the experts follow the last product.
    products += _feedforward("experts", config, picks * width * config.expert_hidden, both, last_again=both)
    if config.shared_experts:
        last_again: tuple[Recompute, ...] = ("block",) if _has_gates(config) else ()
        products += _feedforward("shared_experts", config, rows * width * config.shared_hidden, both, last_again)
    return products


def _time(config: ECDiTConfig, images: int) -> list[Product]:
    """Of one time embedder, whose input is no parameter's doing and needs no gradient."""
    return [
        Product("time", images * TIME_FREQUENCIES * config.width, gradients=1),
        Product("time", images * config.width**2),
    ]


def _first(config: ECDiTConfig, text: TextConfig, images: int, tokens: int) -> list[Product]:
    """Of the part before the layers."""
    patches = images * tokens * config.channels * config.patch**2 * config.width
    products = [Product("patch", patches, gradients=1), *_time(config, images)]
    if config.modulation == "shared":
        products.append(Product("modulation", images * MODULATION_OUTPUTS["shared"] * config.width**2))
    if config.conditioning == "text" and text.pooled:
        products.append(Product("text", images * text.pooled * config.width, gradients=1))
        products.append(Product("text", images * config.width**2))
    return products + (_text(text, images) if config.conditioning == "text" else [])


def _text(text: TextConfig, images: int) -> list[Product]:
    """Of the captions' encoder, or of the projection of states, which need no gradient."""
    rows = images * text.length
    if text.is_frozen:
        return [
            Product("text", rows * text.channels * text.width, gradients=1),
            Product("text", rows * text.width**2),
        ]
    return [
        Product("text", text.layers * rows * 12 * text.width**2),
        Product("text", text.layers * 2 * rows * text.length * text.width, is_scores=True),
    ]


def _head(config: ECDiTConfig, images: int, tokens: int) -> list[Product]:
    products = [Product("head", images * tokens * config.width * config.output_channels * config.patch**2)]
    if config.modulation != "shared":
        products.append(Product("head", images * 2 * config.width**2))
    return products


def layer_flops(config: ECDiTConfig, text: TextConfig, layer: int, tokens: int | None = None) -> float:
    """Forward FLOPs of one layer for one image."""
    group = config.group_images
    return flops_of(layer_products(config, text, layer, group, tokens)).forward / group


def end_flops(config: ECDiTConfig, text: TextConfig, tokens: int | None = None) -> tuple[float, float]:
    """Forward FLOPs of the first part (patches, time, text) and of the last (modulation, head) for one image."""
    tokens = config.tokens if tokens is None else tokens
    return float(flops_of(_first(config, text, 1, tokens)).forward), float(flops_of(_head(config, 1, tokens)).forward)


def stage_costs(config: ECDiTConfig, text: TextConfig, tokens: int | None = None) -> list[float]:
    """Forward FLOPs per layer, with the two ends added to the first and the last layer: what stages are balanced by."""
    costs = [layer_flops(config, text, layer, tokens) for layer in range(config.layers)]
    first, last = end_flops(config, text, tokens)
    costs[0] += first
    costs[-1] += last
    return costs


def forward_flops(config: ECDiTConfig, text: TextConfig, tokens: int | None = None) -> float:
    """Forward FLOPs of the network for one image; a training step takes three times that."""
    return sum(stage_costs(config, text, tokens))
