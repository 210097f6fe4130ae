"""One layer: adaLN self-attention, cross-attention to the caption, adaLN feed-forward or mixture of experts.

PixArt's order (arXiv 2310.00426): cross-attention sits between the two and is not modulated.
"""

from __future__ import annotations

from torch import Tensor, nn

from megadit.model.attention import CrossAttention, SelfAttention
from megadit.model.config import ECDiTConfig
from megadit.model.embed import Modulation, modulate
from megadit.model.feedforward import FeedForward
from megadit.model.moe import ExpertChoiceMoE
from megadit.parallel.grid import Group
from megadit.parallel.tensor.mappings import Region

MODULATION_OUTPUTS = {"scale_shift": 4, "gated": 6}


class Block(nn.Module):
    """(x_BTD, cond_BD, text_BLX) -> x_BTD."""

    def __init__(self, config: ECDiTConfig, text_width: int, layer: int, region: Region, expert_group: Group) -> None:
        super().__init__()
        self.modulation = Modulation(config.width, MODULATION_OUTPUTS[config.modulation], region)
        self.attention = SelfAttention(config, region)
        self.cross_attention = CrossAttention(config, text_width, region)
        self.feedforward: nn.Module
        if config.is_moe(layer):
            self.feedforward = ExpertChoiceMoE(config, region, expert_group)
        else:
            self.feedforward = FeedForward(config, region)

    def forward(self, x_BTD: Tensor, cond_BD: Tensor, text_BLX: Tensor, text_mask_BL: Tensor) -> Tensor:
        vectors = self.modulation(cond_BD)
        half = len(vectors) // 2
        (shift_1, scale_1, *gate_1), (shift_2, scale_2, *gate_2) = vectors[:half], vectors[half:]
        x_BTD = x_BTD + gated(self.attention(modulate(x_BTD, shift_1, scale_1)), gate_1)
        x_BTD = x_BTD + self.cross_attention(x_BTD, text_BLX, text_mask_BL)
        return x_BTD + gated(self.feedforward(modulate(x_BTD, shift_2, scale_2)), gate_2)


def gated(y_BTD: Tensor, gate: list[Tensor]) -> Tensor:
    """A sub-layer's output times its adaLN gate [B, 1, D], where the modulation has one."""
    return y_BTD * gate[0] if gate else y_BTD
