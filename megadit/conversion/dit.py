"""diffusers' DiTTransformer2DModel, and ours in its shape: classes, and embedders of time and class in every layer.

Their timestep k, of 0 to 999, is our time k / 1000. Square images only: theirs takes no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadit.conversion.rule import Rule
from megadit.conversion.transformer2d import (
    DEFAULTS,
    FIXED,
    block,
    common_config,
    common_faults,
    common_sections,
    copied,
    head,
    linear,
    patches,
    refuse,
    renamed,
    settings_of,
)
from megadit.model.config import ECDiTConfig, TextConfig

NAME = "DiTTransformer2DModel"
DIT_FIXED = FIXED | {"norm_type": "ada_norm_zero"}
DIT_DEFAULTS = {**DEFAULTS, **DIT_FIXED, "out_channels": None, "sample_size": 32, "norm_eps": 1e-5}
# Our parameters of an embedder against theirs.
EMBEDDER = {
    "time_in.weight": "timestep_embedder.linear_1.weight",
    "time_in.bias": "timestep_embedder.linear_1.bias",
    "time_out.weight": "timestep_embedder.linear_2.weight",
    "time_out.bias": "timestep_embedder.linear_2.bias",
    "labels": "class_embedder.embedding_table.weight",
}


class DiT:
    """The mapping of DiTTransformer2DModel.

    Theirs has embedders in every layer, and so has ours of it. The published weights hold equal ones, which may also be
    read with model.embedders=shared; a model of ours with shared ones is written as copies.
    """

    def sections(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Raises ValueError listing every setting that does not map."""
        settings, faults = settings_of(config, DIT_DEFAULTS, DIT_FIXED)
        refuse(f"a {NAME} with these settings cannot become ours", faults)
        model = common_sections(settings) | {
            "modulation": "gated",
            "embedders": "per_layer",
            "conditioning": "class",
            "classes": settings["num_embeds_ada_norm"],
            "time_frequency_shift": 1,
            "feedforward_norm_eps": settings["norm_eps"],
        }
        return {"model": model, "text": {}}

    def their_config(self, model: ECDiTConfig, text: TextConfig) -> dict[str, Any]:
        """Raises ValueError listing every setting of ours that theirs cannot have."""
        wanted = {
            "conditioning": "class",
            "modulation": "gated",
            "time_frequency_shift": 1,
            "position_interpolation": 1.0,
            "attention_norm_eps": 1e-6,
        }
        refuse(f"this model cannot become a {NAME}", common_faults(model, wanted))
        return {
            "_class_name": NAME,
            **DIT_DEFAULTS,
            **common_config(model),
            "num_embeds_ada_norm": model.classes,
            "norm_eps": model.feedforward_norm_eps,
        }

    def rules(self, model: ECDiTConfig, text: TextConfig) -> list[Rule]:
        rules = [
            *patches(model.channels, model.patch),
            *embedders(model),
            *linear("head.modulation.linear", "proj_out_1"),
            *head("proj_out_2", model.output_channels, model.patch),
        ]
        for layer in range(model.layers):
            rules += linear(f"blocks.{layer}.modulation.linear", f"transformer_blocks.{layer}.norm1.linear")
            rules += block(layer)
        return rules


def embedders(model: ECDiTConfig) -> list[Rule]:
    """Those of every layer of theirs. Layer 0's serve our head too, as they do theirs."""
    places = {layer: f"transformer_blocks.{layer}.norm1.emb" for layer in range(model.layers)}
    if model.embedders == "shared":
        return [
            copied(f"embed.{ours}", [f"{place}.{theirs}" for place in places.values()])
            for ours, theirs in EMBEDDER.items()
        ]
    return [
        renamed(f"blocks.{layer}.embedder.{ours}" if layer else f"embed.{ours}", f"{place}.{theirs}")
        for layer, place in places.items()
        for ours, theirs in EMBEDDER.items()
    ]
