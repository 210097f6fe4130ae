"""A run that draws RGB pictures for a judge: latents decoded, grey made RGB, with all that a result must say of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from megadit.encoders.condition import Captions, FrozenCaptions
from megadit.evaluation.images import to_rgb
from megadit.runtime.agreement import together
from megadit.sampling.config import SampleConfig
from megadit.training.config import check_sizes
from megadit.training.decoder import Decoder
from megadit.training.restore import Sampler


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

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """In cells. Raises ValueError for a size that has no whole patches."""
        return self.decoder.latent_size(self.size, self.sampler.config.model.patch)

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
            size=self.latent_size,
            there=there,
            drawn=drawn,
        )
        for indices, images_BCHW in shares:
            own = indices if sampler.writes else range(0)
            with together():  # one rank's latents may be what cannot be decoded
                pictures = self.pictures(images_BCHW) if len(own) else []
            yield own, pictures

    def pictures(self, images_BCHW: Tensor) -> list[Image.Image]:
        """Images as the network has them, in RGB."""
        return to_rgb(self.decoder.decode(images_BCHW))

    def check_shows(self) -> None:
        """Raises ValueError for a run on latents without what decodes them, and for a size that cannot be drawn."""
        channels = self.sampler.config.model.channels
        if not self.decoder.name and channels not in (1, 3):
            raise ValueError(
                f"{self.directory}: the run draws latents of {channels} channels; name the autoencoder that decodes "
                "them with --autoencoder"
            )
        if self.latent_size:
            check_sizes(self.sampler.config, [self.latent_size])

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
