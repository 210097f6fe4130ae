"""The two ends of the network: image, time and text into the carry, and tokens back into an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig, TextConfig
from megadit.model.positions import sincos_positions
from megadit.model.text import TextEncoder, TextProjection
from megadit.parallel.placement import Placement, placed
from megadit.parallel.tensor.linear import ColumnParallelLinear, ReplicatedLinear
from megadit.parallel.tensor.mappings import Region, ReplicatedTokens, enter

TIME_FREQUENCIES = 256
MODULATION_OUTPUTS = {"scale_shift": 4, "gated": 6, "shared": 6}  # vectors that a layer is modulated by


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, (H/p)(W/p), C p p], row by row."""
    return F.unfold(image_BCHW, patch, stride=patch).transpose(1, 2)


def kept(tokens_BTX: Tensor, kept_BT: Tensor | None) -> Tensor:
    """The tokens at these places of each image, in this order; None: all of them."""
    if kept_BT is None:
        return tokens_BTX
    return tokens_BTX.gather(1, kept_BT.unsqueeze(2).expand(-1, -1, tokens_BTX.shape[2]))


def unpatchify(tokens_BTP: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for an image of `size` = (H, W)."""
    rows, columns = size[0] // patch, size[1] // patch
    x = tokens_BTP.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def time_features(timesteps_B: Tensor, frequency_shift: int = 0) -> Tensor:
    """Sinusoids [B, 256] of times in [0, 1], which are first spread over 0 to 1000 as DiT's are.

    Frequency i of n is 10000^(-i / (n - frequency_shift)).
    """
    half = TIME_FREQUENCIES // 2
    exponents = -math.log(10000.0) * torch.arange(half, device=timesteps_B.device) / (half - frequency_shift)
    frequencies = torch.exp(exponents)
    angles = 1000.0 * timesteps_B[:, None] * frequencies.to(timesteps_B.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LayerEmbedder(nn.Module):
    """The time and class embedders of one layer, where each has its own: (time, class) -> conditioning [B, D].

    What they read reaches every stage, so nothing more is carried. Layer 0's are the `Embedding`'s, the head's too.
    """

    def __init__(self, config: ECDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.time_in = ReplicatedLinear(TIME_FREQUENCIES, config.width)
        self.time_out = ReplicatedLinear(config.width, config.width)
        # One row more than there are classes: no class, for guidance (DiT).
        has_classes = config.conditioning == "class"
        self.labels = placed((config.classes + 1, config.width)) if has_classes else None

    def forward(self, timesteps_B: Tensor, labels_B: Tensor | None, dtype: torch.dtype) -> Tensor:
        return conditioning(self, timesteps_B, labels_B, dtype)


def conditioning(
    embedders: Embedding | LayerEmbedder, timesteps_B: Tensor, labels_B: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The embedded time, plus the embedded class where there are classes: [B, D]."""
    features = time_features(timesteps_B, embedders.config.time_frequency_shift).to(dtype)
    cond_BD = embedders.time_out(F.silu(embedders.time_in(features)))
    if embedders.labels is None:
        return cond_BD
    assert labels_B is not None
    return cond_BD + F.embedding(labels_B, embedders.labels)


class Embedding(nn.Module):
    """The first part of the first stage: (image, time, caption or class) -> the carry.

    Tokens, conditioning, the shared modulation where there is one, text states where there is text. A caption's pooled
    vector passes two layers with a SiLU between, as the time does, and is added to the conditioning.
    """

    def __init__(self, config: ECDiTConfig, text: TextConfig, region: Region) -> None:
        super().__init__()
        self.config, self.region = config, region
        self.patch = ReplicatedLinear(config.channels * config.patch**2, config.width)
        self.time_in = ReplicatedLinear(TIME_FREQUENCIES, config.width)
        self.time_out = ReplicatedLinear(config.width, config.width)
        has_text = config.conditioning == "text"
        self.text: nn.Module | None = None
        if has_text:
            self.text = TextProjection(text) if text.is_frozen else TextEncoder(text)
        has_pooled = has_text and text.pooled > 0
        self.pooled_in = ReplicatedLinear(text.pooled, config.width) if has_pooled else None
        self.pooled_out = ReplicatedLinear(config.width, config.width) if has_pooled else None
        # One row more than there are classes: no class, for guidance (DiT).
        self.labels = None if has_text else placed((config.classes + 1, config.width))
        self.modulation = SharedModulation(config.width, region) if config.modulation == "shared" else None

    def forward(
        self,
        image_BCHW: Tensor,
        timesteps_B: Tensor,
        text_ids_BL: Tensor | None,
        text_mask_BL: Tensor | None,
        labels_B: Tensor | None,
        text_states_BLC: Tensor | None = None,
        text_pooled_BP: Tensor | None = None,
        kept_BT: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(x_BTD, cond_BD), shared_BVD where the modulation is shared, and text_BLX where there is text.

        kept_BT: the places of the tokens that are seen of each image; the others are dropped here.
        """
        x_BTD = self.patch(kept(patchify(image_BCHW, self.config.patch), kept_BT))
        if self.config.positions == "sincos":
            positions_TD = self._positions(image_BCHW)
            x_BTD = x_BTD + (positions_TD if kept_BT is None else positions_TD[kept_BT])
        x_BTD = self.region.split_tokens(x_BTD)
        dtype = image_BCHW.dtype
        cond_BD = conditioning(self, timesteps_B, labels_B, dtype)
        if self.pooled_in is not None and self.pooled_out is not None:
            assert text_pooled_BP is not None
            cond_BD = cond_BD + self.pooled_out(F.silu(self.pooled_in(text_pooled_BP.to(dtype))))
        carry = [x_BTD, cond_BD] if self.modulation is None else [x_BTD, cond_BD, self.modulation(cond_BD)]
        if isinstance(self.text, TextProjection):
            assert text_states_BLC is not None
            carry.append(self.text(text_states_BLC.to(dtype)))
        elif self.text is not None:
            carry.append(self.text(text_ids_BL, text_mask_BL))
        return tuple(carry)

    def _positions(self, image_BCHW: Tensor) -> Tensor:
        """[T, D], of the images' tokens."""
        config, (height, width) = self.config, image_BCHW.shape[-2:]
        rows, columns = height // config.patch, width // config.patch
        scale = config.position_scale((height, width))
        return sincos_positions(rows, columns, config.width, scale, image_BCHW.device).to(image_BCHW.dtype)


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


class SharedModulation(nn.Module):
    """The modulation of all layers (adaLN-single, arXiv 2310.00426), on the first stage: conditioning -> shared_BVD.

    What comes out is carried whole on every rank, and so is its gradient.
    """

    def __init__(self, width: int, region: Region) -> None:
        super().__init__()
        self.group = region.group
        self.linear = ColumnParallelLinear(width, MODULATION_OUTPUTS["shared"] * width, region.group, bias=True)

    def forward(self, cond_BD: Tensor) -> Tensor:
        vectors_BF = self.linear(F.silu(enter(cond_BD, self.group)))
        whole_BF = ReplicatedTokens(self.group).gather_features(vectors_BF)
        return whole_BF.unflatten(1, (MODULATION_OUTPUTS["shared"], -1))


class Offsets(nn.Module):
    """What a layer, or the head, adds to vectors that it does not have to itself: [B, V, D] -> V of [B, 1, D]."""

    def __init__(self, width: int, count: int, region: Region) -> None:
        super().__init__()
        self.count = count
        self.table = placed((count, width), Placement(partial=region.partial))

    def forward(self, vectors_BVD: Tensor) -> tuple[Tensor, ...]:
        """The vectors have entered the work between the layers; one alone is meant for all of the table."""
        return (vectors_BVD + self.table).chunk(self.count, dim=1)


def normed(x_BTD: Tensor, eps: float = 1e-6) -> Tensor:
    """The layer norm without parameters."""
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=eps)


def modulate(normed_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """adaLN (DiT, arXiv 2212.09748): normalised tokens, scaled and shifted by the conditioning."""
    return normed_BTD * (1 + scale_B1D) + shift_B1D


class Head(nn.Module):
    """The last part of the last stage: tokens and conditioning -> the predicted velocity, [B, C, H, W]."""

    def __init__(self, config: ECDiTConfig, region: Region) -> None:
        super().__init__()
        self.patch, self.region = config.patch, region
        kind = Offsets if config.modulation == "shared" else Modulation
        self.modulation = kind(config.width, 2, region)
        self.linear = ReplicatedLinear(config.width, config.output_channels * config.patch**2, partial=region.partial)

    def forward(self, x_BTD: Tensor, cond_BD: Tensor, size: tuple[int, int] | None) -> Tensor:
        """The conditioning has entered the region; with a shared modulation, the work between the layers.

        size: (H, W), or None for tokens that are no whole image: their patches [B, T, C p p].
        """
        vectors = self.modulation(cond_BD[:, None] if isinstance(self.modulation, Offsets) else cond_BD)
        patches_BTP = self.linear(modulate(normed(x_BTD), *vectors))
        whole_BTP = self.region.collect_tokens(patches_BTP)
        return whole_BTP if size is None else unpatchify(whole_BTP, self.patch, size)
