"""One layer: adaLN self-attention, cross-attention to the caption, adaLN feed-forward or mixture of experts.

PixArt's order (arXiv 2310.00426): cross-attention sits between the two and is not modulated.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megadit.model.attention import CrossAttention, SelfAttention
from megadit.model.config import ECDiTConfig
from megadit.model.embed import Modulation, modulate, normed
from megadit.model.feedforward import FeedForward
from megadit.model.moe import MoE, Routing
from megadit.parallel.grid import Group
from megadit.parallel.tensor.mappings import Region

MODULATION_OUTPUTS = {"scale_shift": 4, "gated": 6}

# Runs a function again in the backward pass instead of keeping its activations.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    """(x_BTD, cond_BD, text_BLX) -> x_BTD, and what the router did where there is one."""

    def __init__(
        self,
        config: ECDiTConfig,
        text_width: int,
        layer: int,
        region: Region,
        expert_group: Group,
        recompute_moe: bool = False,
    ) -> None:
        """`recompute_moe`: keep only the tokens before the mixture of experts, and run it again for the backward."""
        super().__init__()
        self.modulation = Modulation(config.width, MODULATION_OUTPUTS[config.modulation], region)
        self.attention = SelfAttention(config, region)
        has_text = config.conditioning == "text"
        self.cross_attention = CrossAttention(config, text_width, region) if has_text else None
        self.recompute_moe = recompute_moe and config.is_moe(layer)
        self.feedforward: nn.Module
        if config.is_moe(layer):
            self.feedforward = MoE(config, layer, region, expert_group)
        else:
            self.feedforward = FeedForward(config, region, config.hidden, config.bias)

    def forward(
        self, x_BTD: Tensor, cond_BD: Tensor, text_BLX: Tensor | None, text_mask_BL: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        vectors = self.modulation(cond_BD)
        half = len(vectors) // 2
        (shift_1, scale_1, *gate_1), (shift_2, scale_2, *gate_2) = vectors[:half], vectors[half:]
        x_BTD = x_BTD + gated(self.attention(modulate(normed(x_BTD), shift_1, scale_1)), gate_1)
        if self.cross_attention is not None:
            x_BTD = x_BTD + self.cross_attention(x_BTD, text_BLX, text_mask_BL)
        run = partial(recomputed, self._feed) if self.recompute_moe and torch.is_grad_enabled() else self._feed
        y_BTD, routing = run(x_BTD, shift_2, scale_2, cond_BD)
        return x_BTD + gated(y_BTD, gate_2), routing

    def _feed(
        self, x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, cond_BD: Tensor
    ) -> tuple[Tensor, Routing | None]:
        plain_BTD = normed(x_BTD)
        modulated_BTD = modulate(plain_BTD, shift_B1D, scale_B1D)
        if isinstance(self.feedforward, MoE):
            return self.feedforward(modulated_BTD, plain_BTD, cond_BD)
        return self.feedforward(modulated_BTD), None


def gated(y_BTD: Tensor, gate: list[Tensor]) -> Tensor:
    """A sub-layer's output times its adaLN gate [B, 1, D], where the modulation has one."""
    return y_BTD * gate[0] if gate else y_BTD
