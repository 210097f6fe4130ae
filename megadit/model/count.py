"""Floating-point operations of the network, in closed form: what throughput and the balance of stages are reckoned in.

Only matrix products count, two operations per multiply-add, as torch's FlopCounterMode counts them.
"""

from __future__ import annotations

from megadit.model.config import ECDiTConfig
from megadit.model.embed import MODULATION_OUTPUTS, TIME_FREQUENCIES
from megadit.model.text import TextConfig


def layer_flops(config: ECDiTConfig, text: TextConfig, layer: int) -> float:
    """Forward FLOPs of one layer for one image."""
    tokens, width = config.tokens, config.width
    query, key_value = config.heads * config.head_width, config.kv_heads * config.head_width
    attention = tokens * width * (2 * query + 2 * key_value) + 2 * tokens * tokens * query
    if config.conditioning == "text":
        attention += (
            2 * tokens * width * query + 2 * text.length * text.width * key_value + 2 * tokens * text.length * query
        )
    modulation = 0 if config.modulation == "shared" else MODULATION_OUTPUTS[config.modulation] * width * width
    if config.embedders == "per_layer" and layer > 0:
        modulation += _time_products(config)
    feedforward = (
        _moe_products(config, layer) if config.is_moe(layer) else tokens * _hidden_products(config.hidden, config)
    )
    return 2.0 * (attention + modulation + feedforward)


def _time_products(config: ECDiTConfig) -> int:
    """Multiply-adds of one time embedder, for one image."""
    return TIME_FREQUENCIES * config.width + config.width**2


def _hidden_products(hidden: int, config: ECDiTConfig) -> int:
    """Multiply-adds of a feed-forward network of that hidden width, for one token."""
    return (3 if config.feedforward == "swiglu" else 2) * config.width * hidden


def _moe_products(config: ECDiTConfig, layer: int) -> float:
    """Multiply-adds of a mixture of experts for one image; with a capacity, of full experts."""
    tokens, width = config.tokens, config.width
    if config.routing == "token_choice" and config.dropless:
        picks: float = tokens * config.top_k
    else:
        picks = config.experts * config.capacity(layer, tokens * config.group_images) / config.group_images
    router = tokens * width * config.experts
    if config.router_input == "timestep":
        router += width * config.experts
    experts = picks * _hidden_products(config.expert_hidden, config)
    return router + experts + tokens * _hidden_products(config.shared_hidden, config)


def end_flops(config: ECDiTConfig, text: TextConfig) -> tuple[float, float]:
    """Forward FLOPs of the first part (patches, time, text) and of the last (modulation, head) for one image."""
    is_shared = config.modulation == "shared"
    first = config.tokens * config.channels * config.patch**2 * config.width + _time_products(config)
    if is_shared:
        first += MODULATION_OUTPUTS["shared"] * config.width**2
    if config.conditioning == "text":
        first += _text_products(text)
    last = config.tokens * config.width * config.output_channels * config.patch**2
    if not is_shared:
        last += 2 * config.width**2
    return 2.0 * first, 2.0 * last


def _text_products(text: TextConfig) -> int:
    """Multiply-adds of the caption's encoder, or of the projection of its states, for one caption."""
    if text.kind == "states":
        return text.length * (text.channels + text.width) * text.width
    return text.layers * (text.length * 12 * text.width**2 + 2 * text.length**2 * text.width)


def stage_costs(config: ECDiTConfig, text: TextConfig) -> list[float]:
    """Forward FLOPs per layer, with the two ends added to the first and the last layer: what stages are balanced by."""
    costs = [layer_flops(config, text, layer) for layer in range(config.layers)]
    first, last = end_flops(config, text)
    costs[0] += first
    costs[-1] += last
    return costs


def forward_flops(config: ECDiTConfig, text: TextConfig) -> float:
    """Forward FLOPs of the network for one image; a training step takes three times that."""
    return sum(stage_costs(config, text))
