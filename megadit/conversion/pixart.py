"""diffusers' PixArtTransformer2DModel, and ours in its shape: one modulation for all layers, states of T5 for captions.

Their timestep k, of 0 to 999, is our time k / 1000. At other sizes than `sample_size`, theirs scales the positions of
rows and columns each by its own count, ours both by the longer side: square images agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadit.conversion.rule import Rule
from megadit.conversion.transformer2d import (
    DEFAULTS,
    FIXED,
    attention,
    block,
    common_config,
    common_faults,
    common_sections,
    head,
    linear,
    patches,
    refuse,
    renamed,
    settings_of,
)
from megadit.model.config import ECDiTConfig, TextConfig

NAME = "PixArtTransformer2DModel"
PIXART_FIXED = FIXED | {"norm_type": "ada_norm_single", "attention_type": "default"}
PIXART_DEFAULTS = {
    **DEFAULTS,
    **PIXART_FIXED,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
}
CAPTION_LENGTH = 120  # tokens, as PixArt-alpha was trained; theirs takes any number, and does not say


class PixArt:
    """The mapping of PixArtTransformer2DModel."""

    def sections(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Raises ValueError listing every setting that does not map."""
        settings, faults = settings_of(config, PIXART_DEFAULTS, PIXART_FIXED)
        adds_sizes = settings["use_additional_conditions"]
        if adds_sizes or (adds_sizes is None and settings["sample_size"] == 128):
            faults.append(
                "use_additional_conditions=True (the default at sample_size=128), where ours has no embedder of "
                "resolution and aspect ratio"
            )
        if settings["caption_channels"] is None:
            faults.append("caption_channels=None, where captions must pass the two layers of caption_projection")
        width = settings["num_attention_heads"] * settings["attention_head_dim"]
        if settings["cross_attention_dim"] != width:
            wanted = f"only {width}, the width that caption_projection ends in, maps"
            faults.append(f"cross_attention_dim={settings['cross_attention_dim']!r}, where {wanted}")
        refuse(f"a {NAME} with these settings cannot become ours", faults)
        interpolation = settings["interpolation_scale"]
        model = common_sections(settings) | {
            "modulation": "shared",
            "position_interpolation": float(
                max(settings["sample_size"] // 64, 1) if interpolation is None else interpolation
            ),
            "attention_norm_eps": settings["norm_eps"],
            "feedforward_norm_eps": settings["norm_eps"],
        }
        text = {
            "kind": "precomputed",
            "channels": settings["caption_channels"],
            "width": width,
            "length": CAPTION_LENGTH,
        }
        return {"model": model, "text": text}

    def their_config(self, model: ECDiTConfig, text: TextConfig) -> dict[str, Any]:
        """Raises ValueError listing every setting of ours that theirs cannot have."""
        wanted = {
            "conditioning": "text",
            "modulation": "shared",
            "embedders": "shared",
            "time_frequency_shift": 0,
            "feedforward_norm_eps": model.attention_norm_eps,
        }
        faults = common_faults(model, wanted)
        if not text.is_frozen:
            faults.append(f"text.kind={text.kind!r}, where theirs has 'precomputed', a frozen encoder's states")
        if text.pooled:
            faults.append(f"text.pooled={text.pooled}, where theirs has 0")
        if text.width != model.width:
            faults.append(f"text.width={text.width}, where theirs is model.width={model.width}")
        refuse(f"this model cannot become a {NAME}", faults)
        return {
            "_class_name": NAME,
            **PIXART_DEFAULTS,
            **common_config(model),
            "cross_attention_dim": model.width,
            "norm_eps": model.attention_norm_eps,
            "interpolation_scale": model.position_interpolation,
            "use_additional_conditions": False,
            "caption_channels": text.channels,
        }

    def rules(self, model: ECDiTConfig, text: TextConfig) -> list[Rule]:
        rules = [
            *patches(model.channels, model.patch),
            *linear("embed.time_in", "adaln_single.emb.timestep_embedder.linear_1"),
            *linear("embed.time_out", "adaln_single.emb.timestep_embedder.linear_2"),
            *linear("embed.modulation.linear", "adaln_single.linear"),
            *linear("embed.text.project_in", "caption_projection.linear_1"),
            *linear("embed.text.project_out", "caption_projection.linear_2"),
            renamed("head.modulation.table", "scale_shift_table"),
            *head("proj_out", model.output_channels, model.patch),
        ]
        for layer in range(model.layers):
            ours, theirs = f"blocks.{layer}", f"transformer_blocks.{layer}"
            rules.append(renamed(f"{ours}.modulation.table", f"{theirs}.scale_shift_table"))
            rules += [*block(layer), *attention(f"{ours}.cross_attention", f"{theirs}.attn2")]
        return rules
