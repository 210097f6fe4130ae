"""Captions on the first stage: the small trainable encoder, a bidirectional transformer over a caption's tokens, or
the projection of what a frozen encoder made of them.

Whole on every tensor-parallel rank: it is small, and cross-attention sums its gradient over the ranks' heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import TextConfig
from megadit.parallel.placement import placed
from megadit.parallel.tensor.linear import ReplicatedLinear


def readable(text_mask_BL: Tensor) -> Tensor:
    """The mask that attention takes: a caption without a single token is read whole, padding and all.

    A softmax over nothing is 0 / 0, and whether a kernel gives zero or NaN for it depends on the kernel.
    """
    return text_mask_BL | ~text_mask_BL.any(dim=1, keepdim=True)


class Norm(nn.Module):
    """Layer norm over the text width, with a weight and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = placed((width,))

    def forward(self, x_BLX: Tensor) -> Tensor:
        return F.layer_norm(x_BLX, self.weight.shape, self.weight)


class TextLayer(nn.Module):
    """Pre-norm self-attention and feed-forward over the caption; padding is masked as a key."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = Norm(config.width)
        self.qkv = ReplicatedLinear(config.width, 3 * config.width, bias=False)
        self.out = ReplicatedLinear(config.width, config.width, bias=False)
        self.feedforward_norm = Norm(config.width)
        self.up = ReplicatedLinear(config.width, 4 * config.width, bias=False)
        self.down = ReplicatedLinear(4 * config.width, config.width, bias=False)

    def forward(self, x_BLX: Tensor, mask_B11L: Tensor) -> Tensor:
        qkv_BLHK = self.qkv(self.attention_norm(x_BLX)).unflatten(2, (3 * self.heads, -1))
        q_BHLK, k_BHLK, v_BHLK = qkv_BLHK.transpose(1, 2).chunk(3, dim=1)
        y_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_B11L)
        x_BLX = x_BLX + self.out(y_BHLK.transpose(1, 2).flatten(2))
        return x_BLX + self.down(F.gelu(self.up(self.feedforward_norm(x_BLX)), approximate="tanh"))


class TextEncoder(nn.Module):
    """Token ids and mask, both [B, L] -> states [B, L, X]. The mask is True at tokens and False at padding."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.tokens = placed((config.vocabulary, config.width))
        self.positions = placed((config.length, config.width))
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))
        self.norm = Norm(config.width)

    def forward(self, text_ids_BL: Tensor, text_mask_BL: Tensor) -> Tensor:
        x_BLX = F.embedding(text_ids_BL, self.tokens) + self.positions[: text_ids_BL.shape[1]]
        for layer in self.layers:
            x_BLX = layer(x_BLX, readable(text_mask_BL)[:, None, None, :])
        return self.norm(x_BLX)


class TextProjection(nn.Module):
    """States of a frozen text encoder [B, L, C] -> [B, L, X]: two layers with a GELU between (PixArt)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.project_in = ReplicatedLinear(config.channels, config.width)
        self.project_out = ReplicatedLinear(config.width, config.width)

    def forward(self, text_states_BLC: Tensor) -> Tensor:
        return self.project_out(F.gelu(self.project_in(text_states_BLC), approximate="tanh"))
