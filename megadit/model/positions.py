"""Where a token lies on its image: features that are added to it, or angles that queries and keys are turned by.

Both are functions of a token's row and column. Coordinates are multiplied by a `scale`, so that images of another
resolution or shape span the range that the model was trained on (`ECDiTConfig.position_scale`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def sincos_positions(rows: int, columns: int, width: int, scale: float, device: torch.device) -> Tensor:
    """Fixed 2-D positions [rows * columns, width] in float64: half of the features for the column, half for the row.

    As in DiT (arXiv 2212.09748) after MAE.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))

    def encode(count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, dtype=torch.float64, device=device) * scale, frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_row = encode(rows)[:, None, :].expand(rows, columns, -1)
    by_column = encode(columns)[None, :, :].expand(rows, columns, -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1)


@lru_cache(maxsize=64)
def rotary_positions(
    rows: int, columns: int, head_width: int, scale: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Cosines and sines [2, rows * columns, head_width] of the angles that a head's features turn by (`rotate`).

    RoPE (arXiv 2104.09864) along two axes, as FLUX has it: the first half of the features turns with the row, the
    second with the column. Features 2 i and 2 i + 1 of a half of n turn by 10000^(-2 i / n) for each step. At least
    float32: bf16 would blur the angles.
    """
    pairs = head_width // 4
    frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)

    def angles(count: int) -> Tensor:
        steps = torch.arange(count, dtype=torch.float64, device=device) * scale
        return torch.outer(steps, frequencies).unsqueeze(2).expand(-1, -1, 2).flatten(1)

    by_row = angles(rows)[:, None, :].expand(rows, columns, -1)
    by_column = angles(columns)[None, :, :].expand(rows, columns, -1)
    angles_TK = torch.cat([by_row, by_column], dim=2).flatten(0, 1)
    return torch.stack([angles_TK.cos(), angles_TK.sin()]).to(torch.promote_types(dtype, torch.float32))


def rotate(x_BHTK: Tensor, rotary_2BHTK: Tensor) -> Tensor:
    """Each pair of neighbouring features, turned by its angle; cosines and sines broadcast over images and heads."""
    cos, sin = rotary_2BHTK
    wide = x_BHTK.to(cos.dtype)
    even, odd = wide.unflatten(3, (-1, 2)).unbind(4)
    crossed = torch.stack([-odd, even], dim=4).flatten(3)
    return (wide * cos + crossed * sin).to(x_BHTK.dtype)
