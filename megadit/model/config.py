"""The model's shape, and the sizes that the paper names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ECDiTConfig:
    """Everything that fixes the network; the defaults are EC-DiT-XL-32E's."""

    preset: str = ""  # a size of `PRESETS`; the other fields override it

    layers: int = 28
    width: int = 1152
    heads: int = 18
    kv_heads: int = 6
    head_width: int = 64
    ffn_ratio: int = 4  # hidden width of a feed-forward layer or an expert, in model widths
    qk_norm: bool = True
    bias: bool = False  # of the linear layers inside the blocks
    modulation: Literal["scale_shift", "gated"] = "scale_shift"

    experts: int = 32  # 0: the dense twin
    moe_every: int = 2  # the last of every so many layers is a mixture of experts
    capacity_factor: float = 2.0  # mean number of experts that pick a token

    image_size: int = 32  # height and width of the latent image that positions are scaled to
    channels: int = 8
    patch: int = 2

    @property
    def hidden(self) -> int:
        return self.ffn_ratio * self.width

    @property
    def tokens(self) -> int:
        """Tokens of one square image of `image_size`."""
        return (self.image_size // self.patch) ** 2

    def is_moe(self, layer: int) -> bool:
        """Whether the layer (counted from 0) has experts: layers 1, 3, 5, ... when `moe_every` is 2."""
        return self.experts > 0 and (layer + 1) % self.moe_every == 0

    def capacity(self, tokens: int) -> int:
        """Tokens that each expert takes of a routing group of `tokens`: min(S, ceil(S f_c / E))."""
        exact = tokens * self.capacity_factor / self.experts
        return min(tokens, math.ceil(exact - 1e-9))  # 100 x 1.1 / 10 is a little more than 11 in floating point


def _size(layers: int, width: int, kv_heads: int, experts: int) -> dict[str, int]:
    return {"layers": layers, "width": width, "heads": width // 64, "kv_heads": kv_heads, "experts": experts}


# EC-DiT's sizes (arXiv 2410.02098). The dense M has 46 layers, the sparse one 38.
PRESETS: dict[str, dict[str, int]] = {
    "ec-dit-xl": _size(28, 1152, 6, 0),
    "ec-dit-xl-32e": _size(28, 1152, 6, 32),
    "ec-dit-xxl": _size(38, 1536, 6, 0),
    "ec-dit-xxl-8e": _size(38, 1536, 6, 8),
    "ec-dit-xxl-16e": _size(38, 1536, 6, 16),
    "ec-dit-xxl-32e": _size(38, 1536, 6, 32),
    "ec-dit-3xl": _size(42, 2304, 6, 0),
    "ec-dit-3xl-32e": _size(42, 2304, 6, 32),
    "ec-dit-m": _size(46, 3072, 12, 0),
    "ec-dit-m-64e": _size(38, 3072, 12, 64),
}
