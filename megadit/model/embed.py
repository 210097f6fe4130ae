"""The two ends of the network: image, time and text into the carry, and tokens back into an image."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig
from megadit.model.text import TextConfig, TextEncoder
from megadit.parallel.placement import placed
from megadit.parallel.tensor.linear import ColumnParallelLinear, ReplicatedLinear
from megadit.parallel.tensor.mappings import Region

TIME_FREQUENCIES = 256


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, (H/p)(W/p), C p p], row by row."""
    return F.unfold(image_BCHW, patch, stride=patch).transpose(1, 2)


def unpatchify(tokens_BTP: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for an image of `size` = (H, W)."""
    rows, columns = size[0] // patch, size[1] // patch
    x = tokens_BTP.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@lru_cache(maxsize=64)
def sincos_positions(rows: int, columns: int, width: int, scale: float, device: torch.device) -> Tensor:
    """Fixed 2-D positions [rows * columns, width] in float64: half of the features for the column, half for the row.

    As in DiT (arXiv 2212.09748) after MAE; `scale` multiplies the coordinates, so that another resolution spans the
    range that the model was trained on.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))

    def encode(count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, dtype=torch.float64, device=device) * scale, frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_row = encode(rows)[:, None, :].expand(rows, columns, -1)
    by_column = encode(columns)[None, :, :].expand(rows, columns, -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1)


def time_features(timesteps_B: Tensor) -> Tensor:
    """Sinusoids [B, 256] of times in [0, 1], which are first spread over 0 to 1000 as DiT's are."""
    half = TIME_FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps_B.device) / half)
    angles = 1000.0 * timesteps_B[:, None] * frequencies.to(timesteps_B.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Embedding(nn.Module):
    """The first part of the first stage: (image, time, caption or class) -> tokens, conditioning, text states."""

    def __init__(self, config: ECDiTConfig, text: TextConfig, region: Region) -> None:
        super().__init__()
        self.config, self.region = config, region
        self.patch = ReplicatedLinear(config.channels * config.patch**2, config.width)
        self.time_in = ReplicatedLinear(TIME_FREQUENCIES, config.width)
        self.time_out = ReplicatedLinear(config.width, config.width)
        has_text = config.conditioning == "text"
        self.text = TextEncoder(text) if has_text else None
        # One row more than there are classes: no class, for guidance (DiT).
        self.labels = None if has_text else placed((config.classes + 1, config.width))

    def forward(
        self,
        image_BCHW: Tensor,
        timesteps_B: Tensor,
        text_ids_BL: Tensor | None,
        text_mask_BL: Tensor | None,
        labels_B: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """(x_BTD, cond_BD), and text_BLX where there is text."""
        patch, (height, width) = self.config.patch, image_BCHW.shape[-2:]
        scale = self.config.image_size / max(height, width)
        positions_TD = sincos_positions(
            height // patch, width // patch, self.config.width, scale, image_BCHW.device
        ).to(image_BCHW.dtype)
        x_BTD = self.region.split_tokens(self.patch(patchify(image_BCHW, patch)) + positions_TD)
        cond_BD = self.time_out(F.silu(self.time_in(time_features(timesteps_B).to(image_BCHW.dtype))))
        if self.text is not None:
            return x_BTD, cond_BD, self.text(text_ids_BL, text_mask_BL)
        assert labels_B is not None and self.labels is not None
        return x_BTD, cond_BD + F.embedding(labels_B, self.labels)


class Modulation(nn.Module):
    """The adaLN vectors of one layer: SiLU and a linear layer of the conditioning -> `count` of [B, 1, D].

    The conditioning has entered the region.
    """

    def __init__(self, width: int, count: int, region: Region) -> None:
        super().__init__()
        self.count, self.region = count, region
        self.linear = ColumnParallelLinear(width, count * width, region.group, bias=True)

    def forward(self, cond_BD: Tensor) -> tuple[Tensor, ...]:
        return self.region.gather_features(self.linear(F.silu(cond_BD))).unsqueeze(1).chunk(self.count, dim=2)


def normed(x_BTD: Tensor) -> Tensor:
    """The layer norm without parameters."""
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6)


def modulate(normed_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """adaLN (DiT, arXiv 2212.09748): normalised tokens, scaled and shifted by the conditioning."""
    return normed_BTD * (1 + scale_B1D) + shift_B1D


class Head(nn.Module):
    """The last part of the last stage: tokens and conditioning -> the predicted velocity [B, C, H, W]."""

    def __init__(self, config: ECDiTConfig, region: Region) -> None:
        super().__init__()
        self.patch, self.region = config.patch, region
        self.modulation = Modulation(config.width, 2, region)
        self.linear = ReplicatedLinear(config.width, config.channels * config.patch**2, partial=region.partial)

    def forward(self, x_BTD: Tensor, cond_BD: Tensor, size: tuple[int, int]) -> Tensor:
        patches_BTP = self.linear(modulate(normed(x_BTD), *self.modulation(cond_BD)))
        return unpatchify(self.region.collect_tokens(patches_BTP), self.patch, size)
