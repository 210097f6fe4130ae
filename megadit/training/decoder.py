"""What makes pixels of the latents that a run draws: its autoencoder, or nothing where latents are pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megadit.encoders.autoencoder import Autoencoder
from megadit.training.config import RunConfig
from megadit.training.encoded import Named, autoencoder_of


class Decoder(NamedTuple):
    """decode: latents [B, C, H, W] to pixels. cell: pixels along one side of a latent's cell. name: the autoencoder's.

    As it is by default, latents are pixels.
    """

    decode: Callable[[Tensor], Tensor] = lambda images_BCHW: images_BCHW
    cell: int = 1
    name: str = ""

    @classmethod
    def of(cls, autoencoder: Autoencoder, name: str = "") -> Decoder:
        """An autoencoder's; `name`: for people."""

        def decode(latents_BCHW: Tensor) -> Tensor:
            # One at a time: the sums of a larger batch may be in another order, and take more memory.
            return torch.cat([autoencoder.decode(latent) for latent in latents_BCHW.split(1)])

        return cls(decode, autoencoder.downscale, name)

    def latent_size(self, size: tuple[int, int] | None, patch: int) -> tuple[int, int] | None:
        """(height, width) in cells of a --size in pixels. Raises ValueError for one that has no whole patches."""
        if size is None:
            return None
        step = self.cell * patch
        if size[0] % step or size[1] % step:
            raise ValueError(f"--size {size[0]}x{size[1]} must be multiples of {step} pixels")
        return size[0] // self.cell, size[1] // self.cell


def open_decoder(config: RunConfig, asked_for: str | None, device: torch.device, online: bool = False) -> Decoder:
    """That of the autoencoder which --autoencoder names, else of the run's.

    `online`: one that is not on this machine is downloaded. Raises ValueError if it is not there, if its latents are
    not the run's, or nothing says which that is.
    """
    named = named_autoencoder(config, asked_for)
    if named is None:
        return Decoder()
    autoencoder = Autoencoder.load(named.name, device, torch.float32, named.revision, online)
    if autoencoder.channels != config.model.channels:
        raise ValueError(
            f"the autoencoder {named.name} has latents of {autoencoder.channels} channels, the run {config.directory} "
            f"draws {config.model.channels}; name the one that its data was encoded with: --autoencoder"
        )
    return Decoder.of(autoencoder, named.name)


def named_autoencoder(config: RunConfig, asked_for: str | None) -> Named | None:
    """The one that is asked for, else the run's; None where latents are pixels. Raises ValueError if nothing says which
    that is.
    """
    if asked_for:
        return Named(asked_for, "")
    try:
        return autoencoder_of(config)
    except ValueError as error:
        raise ValueError(f"{error}; without it, name what decodes pictures with --autoencoder") from error
