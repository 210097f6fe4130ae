"""The frozen encoders of a data set, used together: images to latents, captions to states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megadit.data.manifest import TextKind
from megadit.data.shards import Caption
from megadit.runtime.seed import stream

Latents = Literal["mean", "sample"]


class ImageEncoder(Protocol):
    """What the encoding needs of `megadit.encoders.autoencoder.Autoencoder`."""

    identity: dict[str, Any]
    downscale: int

    def encode(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor: ...


class States(Protocol):
    """What a text encoder gives: states [B, L, C], a mask [B, L], True at tokens, and perhaps pooled vectors [B, P]."""

    @property
    def states_BLC(self) -> Tensor: ...

    @property
    def mask_BL(self) -> Tensor: ...

    @property
    def pooled_BP(self) -> Tensor | None: ...


class TextEncoder(Protocol):
    """What the encoding needs of `megadit.encoders.frozen_text.FrozenText`."""

    identity: dict[str, Any]
    kind: Any

    def encode(self, texts: Sequence[str]) -> States: ...

    def too_long(self, texts: Sequence[str]) -> list[str]: ...


class Pixels:
    """No autoencoder: latents are the pixels themselves, [B, 3, H, W] in [-1, 1]."""

    identity: dict[str, Any] = {}
    downscale = 1

    def encode(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        return pixels_BCHW


@dataclass(frozen=True)
class Frozen:
    """One autoencoder, and a T5 or a CLIP, both or neither. With both, states are T5's and pooled vectors CLIP's."""

    autoencoder: ImageEncoder
    t5: TextEncoder | None = None
    clip: TextEncoder | None = None

    @property
    def text(self) -> list[TextEncoder]:
        return [encoder for encoder in (self.t5, self.clip) if encoder is not None]

    @property
    def text_kind(self) -> TextKind:
        if self.t5 is not None:
            return "t5" if self.clip is None else "t5+clip"
        return "none" if self.clip is None else "clip"

    def latents(
        self, pixels_BCHW: Tensor, keys: Sequence[str], kind: Latents, seed: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """[C, h, w] of each image. What is random about a sample of the posterior follows from the sample's key."""
        generators = [stream(seed, "posterior", key) for key in keys] if kind == "sample" else None
        with torch.no_grad():
            return list(self.autoencoder.encode(pixels_BCHW, generators).to("cpu", dtype))

    def captions(self, texts: Sequence[str], weights: Sequence[float], dtype: torch.dtype) -> list[Caption]:
        """Each text encoded, without padding."""
        assert self.text
        with torch.no_grad():
            told = [encoder.encode(texts) for encoder in self.text]
        states_BLC, mask_BL, pooled_BP = told[0].states_BLC, told[0].mask_BL.cpu(), told[-1].pooled_BP
        states_BLC = states_BLC.to("cpu", dtype)
        pooled_BP = None if pooled_BP is None else pooled_BP.to("cpu", dtype)
        return [
            Caption(states_BLC[i][mask_BL[i]], None if pooled_BP is None else pooled_BP[i], weights[i])
            for i in range(len(texts))
        ]

    def cut(self, texts: Sequence[str]) -> dict[str, int]:
        """How many of the texts are longer than each encoder reads, by its kind."""
        return {encoder.kind: len(encoder.too_long(texts)) for encoder in self.text}
