"""Grouped-query attention over image tokens or text, heads cut over the tensor axis."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig
from megadit.model.positions import rotate
from megadit.parallel.placement import Placement, placed
from megadit.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from megadit.parallel.tensor.mappings import Region


class HeadNorm(nn.Module):
    """RMS norm over each head's width (QK-norm, arXiv 2302.05442), one weight that all heads share.

    A rank's gradient covers its own heads only, so it is summed over the tensor axis after the backward pass.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.weight = placed((head_width,), Placement(partial=("tp",)))

    def forward(self, x_BHTK: Tensor) -> Tensor:
        return F.rms_norm(x_BHTK, self.weight.shape, self.weight, eps=1e-6)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v with fewer key-value heads than query heads (GQA, arXiv 2305.13245)."""

    def __init__(self, config: ECDiTConfig, context_width: int, region: Region) -> None:
        super().__init__()
        self.head_width, self.region = config.head_width, region
        query, key_value = config.heads * config.head_width, config.kv_heads * config.head_width
        # Separate tensors: a fused one could not be cut as one slice.
        self.q = ColumnParallelLinear(config.width, query, region.group, config.bias)
        self.k = ColumnParallelLinear(context_width, key_value, region.group, config.bias)
        self.v = ColumnParallelLinear(context_width, key_value, region.group, config.bias)
        self.out = RowParallelLinear(query, config.width, region, config.bias)
        self.q_norm = HeadNorm(config.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_width) if config.qk_norm else nn.Identity()

    def _heads(self, x_BTF: Tensor) -> Tensor:
        return x_BTF.unflatten(2, (-1, self.head_width)).transpose(1, 2)

    def attend(
        self, x_BTD: Tensor, context_BSX: Tensor, mask_B11S: Tensor | None, rotary_2BHTK: Tensor | None = None
    ) -> Tensor:
        """Queries from x, keys and values from the context; both have entered the region.

        rotary_2BHTK: what queries and keys are turned by, which then are of the same tokens.
        """
        q_BHTK = self.q_norm(self._heads(self.q(x_BTD)))
        k_BHSK = self.k_norm(self._heads(self.k(context_BSX)))
        if rotary_2BHTK is not None:
            q_BHTK, k_BHSK = rotate(q_BHTK, rotary_2BHTK), rotate(k_BHSK, rotary_2BHTK)
        v_BHSK = self._heads(self.v(context_BSX))
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask_B11S, enable_gqa=True)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Every image token attends to every other of its image."""

    def __init__(self, config: ECDiTConfig, region: Region) -> None:
        super().__init__(config, config.width, region)

    def forward(self, x_BTD: Tensor, rotary_2BHTK: Tensor | None = None) -> Tensor:
        """The rotary positions are those of all tokens: that is what is seen once x has entered the region."""
        entered_BTD = self.region.enter(x_BTD)
        return self.attend(entered_BTD, entered_BTD, None, rotary_2BHTK)


class CrossAttention(Attention):
    """Image tokens attend to the caption's tokens, which have entered the region; padding is masked."""

    def __init__(self, config: ECDiTConfig, text_width: int, region: Region) -> None:
        super().__init__(config, text_width, region)

    def forward(self, x_BTD: Tensor, text_BLX: Tensor, text_mask_BL: Tensor) -> Tensor:
        return self.attend(self.region.enter(x_BTD), text_BLX, text_mask_BL[:, None, None, :])
