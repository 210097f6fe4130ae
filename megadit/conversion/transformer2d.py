"""What PixArt's and DiT's classes in diffusers have in common: settings, patches, blocks and head.

Both were one class once, Transformer2DModel, which published config.json files still name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megadit.conversion.rule import Rule
from megadit.model.config import ECDiTConfig

# Settings that a network of either class must have to be one of ours.
FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_elementwise_affine": False,
}
DEFAULTS = FIXED | {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "norm_num_groups": 32,  # read by nothing
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
# What only Transformer2DModel had, and must not have been used.
LEGACY = {
    "num_vector_embeds": (None, False),
    "use_linear_projection": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "attention_type": ("default", None),
    "cross_attention_dim": (None,),
    "caption_channels": (None,),
    "interpolation_scale": (None,),
    "use_additional_conditions": (None, False),
}
COUNTS = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size",
          "num_embeds_ada_norm", "out_channels", "caption_channels", "cross_attention_dim")  # fmt: skip
NUMBERS = ("norm_eps", "interpolation_scale")
OPTIONAL = ("out_channels", "caption_channels", "cross_attention_dim", "interpolation_scale")  # may be None


def settings_of(
    config: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """(every setting of a config.json, with the class's defaults; what is wrong with them, in words)."""
    faults = []
    for key, value in config.items():
        if not key.startswith("_") and key not in defaults and value not in LEGACY.get(key, ()):
            faults.append(f"{key}={value!r} is not known here")
    settings = {**defaults, **{key: value for key, value in config.items() if key in defaults}}
    for key, wanted in fixed.items():
        if settings[key] != wanted:
            faults.append(f"{key}={settings[key]!r}, where only {wanted!r} maps")
    for keys, kind, what in ((COUNTS, int, "a whole number"), (NUMBERS, (int, float), "a number")):
        for key in keys:
            value = settings.get(key)
            if value is None and (key in OPTIONAL or key not in defaults):
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
                faults.append(f"{key}={value!r} is not {what} of more than 0")
                settings[key] = defaults[key]  # so that the rest can be looked at
    return settings, faults


def refuse(what: str, faults: Sequence[str]) -> None:
    """Raises ValueError with all the faults, if there are any."""
    if faults:
        raise ValueError(f"{what}: {'; '.join(faults)}")


def common_sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our model section, so far as both classes have it."""
    channels, out_channels = settings["in_channels"], settings["out_channels"] or settings["in_channels"]
    return {
        "layers": settings["num_layers"],
        "width": settings["num_attention_heads"] * settings["attention_head_dim"],
        "heads": settings["num_attention_heads"],
        "kv_heads": settings["num_attention_heads"],
        "head_width": settings["attention_head_dim"],
        "qk_norm": False,
        "bias": True,
        "experts": 0,
        "image_size": settings["sample_size"],
        "channels": channels,
        "out_channels": 0 if out_channels == channels else out_channels,
        "patch": settings["patch_size"],
    }


def common_config(model: ECDiTConfig) -> dict[str, Any]:
    """Their settings, so far as both classes have them."""
    return DEFAULTS | {
        "num_attention_heads": model.heads,
        "attention_head_dim": model.head_width,
        "in_channels": model.channels,
        "out_channels": model.output_channels,
        "num_layers": model.layers,
        "sample_size": model.image_size,
        "patch_size": model.patch,
    }


def common_faults(model: ECDiTConfig, wanted: Mapping[str, Any]) -> list[str]:
    """What of ours neither class can have, and what is not as `wanted`."""
    wanted = {
        "kv_heads": model.heads,
        "qk_norm": False,
        "bias": True,
        "feedforward": "gelu",
        "positions": "sincos",
        **wanted,
    }
    faults = [
        f"model.{key}={getattr(model, key)!r}, where theirs has {value!r}"
        for key, value in wanted.items()
        if getattr(model, key) != value
    ]
    if model.has_experts:
        faults.append(f"model.experts={model.experts}, where theirs has none")
    if model.hidden != 4 * model.width:
        faults.append(f"model.ffn_ratio={model.ffn_ratio}, where theirs is 4")
    width = model.heads * model.head_width
    if model.width != width:
        faults.append(f"model.width={model.width}, where theirs is model.heads x model.head_width={width}")
    return faults


def renamed(ours: str, theirs: str) -> Rule:
    """The same tensor under two names."""
    return Rule((ours,), (theirs,), list, list)


def linear(ours: str, theirs: str) -> list[Rule]:
    """A linear layer with its bias under two names."""
    return [renamed(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def copied(ours: str, theirs: Sequence[str]) -> Rule:
    """One of our tensors, of which each of theirs is a copy."""

    def to_ours(tensors: Sequence[Tensor]) -> list[Tensor]:
        first, *others = tensors
        for name, other in zip(theirs[1:], others, strict=True):
            # As bytes: not a number is a copy of itself.
            if not torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (first, other))):
                raise ValueError(
                    f"{name} differs from {theirs[0]}, and {ours} can only be one of them; "
                    "set model.embedders=per_layer, which has them all"
                )
        return [first]

    return Rule((ours,), tuple(theirs), to_ours, lambda tensors: [tensors[0].clone() for _ in theirs])


def patches(channels: int, patch: int) -> list[Rule]:
    """Theirs are cut by a convolution, of a kernel [D, C, p, p]; ours by a linear layer [D, C p p]."""
    weight = Rule(
        ("embed.patch.weight",),
        ("pos_embed.proj.weight",),
        lambda tensors: [tensors[0].flatten(1)],
        lambda tensors: [tensors[0].unflatten(1, (channels, patch, patch))],
    )
    return [weight, renamed("embed.patch.bias", "pos_embed.proj.bias")]


def head(theirs: str, channels: int, patch: int) -> list[Rule]:
    """Rows of theirs are (row in the patch, column, channel), those of ours (channel, row, column)."""

    def to_ours(tensors: Sequence[Tensor]) -> list[Tensor]:
        pixels_PQC = tensors[0].unflatten(0, (patch, patch, channels))
        return [pixels_PQC.movedim(2, 0).flatten(0, 2)]

    def to_theirs(tensors: Sequence[Tensor]) -> list[Tensor]:
        pixels_CPQ = tensors[0].unflatten(0, (channels, patch, patch))
        return [pixels_CPQ.movedim(0, 2).flatten(0, 2)]

    return [Rule((f"head.linear.{part}",), (f"{theirs}.{part}",), to_ours, to_theirs) for part in ("weight", "bias")]


def attention(ours: str, theirs: str) -> list[Rule]:
    """Queries, keys, values and the way out."""
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    return [rule for our, their in names.items() for rule in linear(f"{ours}.{our}", f"{theirs}.{their}")]


def block(layer: int) -> list[Rule]:
    """Self-attention and feed-forward of one layer."""
    ours, theirs = f"blocks.{layer}", f"transformer_blocks.{layer}"
    return [
        *attention(f"{ours}.attention", f"{theirs}.attn1"),
        *linear(f"{ours}.feedforward.up", f"{theirs}.ff.net.0.proj"),
        *linear(f"{ours}.feedforward.down", f"{theirs}.ff.net.2"),
    ]
