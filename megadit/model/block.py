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
from megadit.model.embed import MODULATION_OUTPUTS, LayerEmbedder, Modulation, Offsets, modulate, normed
from megadit.model.feedforward import FeedForward
from megadit.model.moe import MoE, Routing
from megadit.parallel.grid import Group
from megadit.parallel.tensor.mappings import Region

# Runs a function again in the backward pass instead of keeping its activations.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    """(x_BTD, cond_BD, text_BLX) -> x_BTD, and what the router did where there is one.

    embedder: makes the conditioning of this layer, where it is not the one that is carried.
    """

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
        kind = Offsets if config.modulation == "shared" else Modulation
        self.modulation = kind(config.width, MODULATION_OUTPUTS[config.modulation], region)
        has_embedder = config.embedders == "per_layer" and layer > 0
        self.embedder = LayerEmbedder(config) if has_embedder else None
        self.norm_eps = config.attention_norm_eps, config.feedforward_norm_eps
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
        self,
        x_BTD: Tensor,
        cond_BD: Tensor,
        text_BLX: Tensor | None,
        text_mask_BL: Tensor | None,
        shared_BVD: Tensor | None = None,
        rotary_2BHTK: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """cond_BD and text_BLX have entered the region, a shared modulation the work between the layers.

        rotary_2BHTK: of all tokens, where positions are rotary.
        """
        vectors = self.modulation(cond_BD if shared_BVD is None else shared_BVD)
        half = len(vectors) // 2
        (shift_1, scale_1, *gate_1), (shift_2, scale_2, *gate_2) = vectors[:half], vectors[half:]
        modulated_BTD = modulate(normed(x_BTD, self.norm_eps[0]), shift_1, scale_1)
        x_BTD = x_BTD + gated(self.attention(modulated_BTD, rotary_2BHTK), gate_1)
        if self.cross_attention is not None:
            x_BTD = x_BTD + self.cross_attention(x_BTD, text_BLX, text_mask_BL)
        run = partial(recomputed, self._feed) if self.recompute_moe and torch.is_grad_enabled() else self._feed
        y_BTD, routing = run(x_BTD, shift_2, scale_2, cond_BD)
        return x_BTD + gated(y_BTD, gate_2), routing

    def _feed(
        self, x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, cond_BD: Tensor
    ) -> tuple[Tensor, Routing | None]:
        plain_BTD = normed(x_BTD, self.norm_eps[1])
        modulated_BTD = modulate(plain_BTD, shift_B1D, scale_B1D)
        if isinstance(self.feedforward, MoE):
            return self.feedforward(modulated_BTD, plain_BTD, cond_BD)
        return self.feedforward(modulated_BTD), None


def gated(y_BTD: Tensor, gate: list[Tensor]) -> Tensor:
    """A sub-layer's output times its adaLN gate [B, 1, D], where the modulation has one."""
    return y_BTD * gate[0] if gate else y_BTD
