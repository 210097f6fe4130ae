"""diffusers' NucleusMoEImageTransformer2DModel (Nucleus-Image): its mixtures of experts are ours, the rest is not.

`routing_preset: nucleus` routes as it does; this maps the weights of such a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megadit.conversion.rule import Rule
from megadit.conversion.transformer2d import renamed
from megadit.model.config import ECDiTConfig, TextConfig

NAME = "NucleusMoEImageTransformer2DModel"
# What of theirs has no place in ours, by the names of their parameters where there are any.
MISSING = (
    "attention over image and text in one softmax (attn.add_k_proj, attn.add_v_proj; ours has two attentions)",
    "rotary positions over image and text together (ours turn those of the image alone)",
    "gates without shifts, clamped and through tanh (img_mod; ours shifts and scales, with plain gates or none)",
    "a projection of the text in every layer (encoder_proj) and a norm of it (txt_norm)",
    "a norm of the embedded time (time_text_embed.norm), whose features are as wide as the model (ours: 256)",
    "a dense last layer (dense_moe_strategy), and dense layers of another hidden width (mlp_ratio)",
    "linear layers without biases at both ends (proj_out)",
)


def moe_layer(ours: str, theirs: str) -> list[Rule]:
    """One mixture of experts under its two prefixes, such as blocks.3.feedforward and transformer_blocks.3.img_mlp.

    Theirs keeps an expert's gate and up side by side, and its shared expert's up and gate one below the other.
    """
    return [
        renamed(f"{ours}.router.weight", f"{theirs}.gate.weight"),
        joined((f"{ours}.experts.gate", f"{ours}.experts.up"), f"{theirs}.experts.gate_up_proj", dim=-1),
        renamed(f"{ours}.experts.down", f"{theirs}.experts.down_proj"),
        joined(
            (f"{ours}.shared.up.weight", f"{ours}.shared.gate.weight"), f"{theirs}.shared_expert.net.0.proj.weight", 0
        ),
        renamed(f"{ours}.shared.down.weight", f"{theirs}.shared_expert.net.2.weight"),
    ]


def joined(ours: tuple[str, str], theirs: str, dim: int) -> Rule:
    """Two of ours, which theirs keeps as one, side by side along `dim`; of an expert's tensors a single one will do."""

    def to_ours(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [half.contiguous() for half in tensors[0].chunk(2, dim)]

    return Rule(ours, (theirs,), to_ours, lambda tensors: [torch.cat(list(tensors), dim)])


class Nucleus:
    """Says why the whole network does not map."""

    def sections(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Raises ValueError listing what of theirs has no place in ours."""
        raise ValueError(
            f"a {NAME} cannot become ours; only its mixtures of experts map (model.routing_preset=nucleus). Theirs "
            f"has: {'; '.join(MISSING)}"
        )

    def their_config(self, model: ECDiTConfig, text: TextConfig) -> dict[str, Any]:
        """Raises ValueError, as `sections`."""
        raise ValueError(f"this model cannot become a {NAME}, which has: {'; '.join(MISSING)}")

    def rules(self, model: ECDiTConfig, text: TextConfig) -> list[Rule]:
        """Raises ValueError, as `sections`."""
        raise ValueError(f"no model of ours is a {NAME}, which has: {'; '.join(MISSING)}")
