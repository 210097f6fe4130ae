"""A run that draws RGB pictures for a judge: latents decoded, grey made RGB, with all that a result must say of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megadit.encoders.condition import Captions, FrozenCaptions
from megadit.evaluation.images import to_rgb
from megadit.sampling.generate import SampleConfig
from megadit.training.encoded import Named
from megadit.training.restore import Sampler


@dataclass(frozen=True)
class Decoder:
    """What makes pixels of latents. cell: pixels along a cell's side; name: "" where latents are pixels."""

    decode: Callable[[Tensor], Tensor]
    cell: int = 1
    name: str = ""

    def latent_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """(height, width) in cells of a size in pixels. Raises ValueError for one that cells do not divide."""
        if size is None:
            return None
        if size[0] % self.cell or size[1] % self.cell:
            raise ValueError(f"--size {size[0]}x{size[1]} must be multiples of {self.cell} pixels")
        return size[0] // self.cell, size[1] // self.cell


def open_decoder(named: Named | None, device: torch.device) -> Decoder:
    """That of an autoencoder on this machine; without one, latents are pixels. Raises ValueError if it is not there."""
    if named is None:
        return Decoder(lambda images_BCHW: images_BCHW)
    from megadit.encoders.autoencoder import Autoencoder

    autoencoder = Autoencoder.load(named.name, device, torch.float32, named.revision)
    return Decoder(
        lambda latents_BCHW: torch.cat([autoencoder.decode(each) for each in latents_BCHW.split(1)]),
        autoencoder.downscale,
        named.name,
    )


@dataclass(frozen=True)
class Painter:
    """A run and how it draws. size: (height, width) in pixels, None for the model's square."""

    directory: Path
    sampler: Sampler
    decoder: Decoder
    settings: SampleConfig
    seed: int
    size: tuple[int, int] | None = None
    batch: int | None = None

    def turns(
        self,
        prompts: Sequence[str],
        there: Container[int] = (),
        drawn: Callable[[range], None] = lambda pictures: None,
    ) -> Iterator[tuple[range, list[Image.Image]]]:
        """(indices into the prompts, their pictures) of each turn, of those that this rank is to write.

        Collective, as every turn is; there and drawn: see `Sampler.shares`. Raises ValueError as it does.
        """
        sampler = self.sampler
        shares = sampler.shares(
            prompts,
            self.settings,
            self.seed,
            batch=self.batch,
            size=self.decoder.latent_size(self.size),
            there=there,
            drawn=drawn,
        )
        for indices, images_BCHW in shares:
            if sampler.writes and len(indices):
                yield indices, self.pictures(images_BCHW)
            else:
                yield range(0), []

    def pictures(self, images_BCHW: Tensor) -> list[Image.Image]:
        """Images as the network has them, in RGB."""
        return to_rgb(self.decoder.decode(images_BCHW))

    def check_shows(self) -> None:
        """Raises ValueError for a run on latents without what decodes them."""
        channels = self.sampler.config.model.channels
        if not self.decoder.name and channels not in (1, 3):
            raise ValueError(
                f"{self.directory}: the run draws latents of {channels} channels; name the autoencoder that decodes "
                "them with --autoencoder"
            )

    def check_reads_text(self, benchmark: str) -> None:
        """Raises ValueError for a run whose prompts are no captions."""
        if isinstance(self.sampler.condition, Captions | FrozenCaptions):
            return
        if self.sampler.config.model.conditioning == "class":
            why = "is told classes (model.conditioning=class), not captions"
        else:
            kind = self.sampler.config.text.kind
            why = f"reads stored captions (text.kind={kind}), not text; name its encoders with text.kind=t5, clip, ..."
        raise ValueError(f"{self.directory}: the run {why}; {benchmark} needs a run that reads text")

    def identity(self) -> dict[str, Any]:
        """What a picture depends on besides its prompt and its number; for JSON."""
        model = self.sampler.config.model
        cell = self.decoder.cell
        square = (model.image_size * cell, model.image_size * cell)
        return {
            "run": str(self.directory),
            "step": self.sampler.step,
            "seed": self.seed,
            **asdict(self.settings),
            "size": list(self.size or square),
            "autoencoder": self.decoder.name,
            "dtype": self.sampler.config.run.dtype,
        }
