"""What images start from, as a user of diffusers says it: a seed, generators, or latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megadit.sampling.generate import noise_of

Generators = int | torch.Generator | Sequence[int] | Sequence[torch.Generator] | None
WANTED = "an int, a torch.Generator, or a list with one of them for each picture"


def starting_point(generator: Generators, count: int, image_shape: tuple[int, int, int]) -> tuple[int, Tensor | None]:
    """(seed, latents [count, C, H, W]); latents are None where the seed decides.

    A seed s: picture i starts from noise_of(s, [i]), as in tools/sample.py. A generator draws the pictures in turn, and
    goes on. A list has one stream for each picture; a seed in it draws what that seed alone draws first. None: a seed
    from torch's global generator, so that torch.manual_seed decides. Raises ValueError for anything else.
    """
    if generator is None:
        return int(torch.randint(2**62, ())), None
    if is_seed(generator):
        return int(generator), None  # type: ignore[arg-type]
    if isinstance(generator, torch.Generator):
        return 0, torch.stack([normal(generator, image_shape) for _ in range(count)])
    if not isinstance(generator, list | tuple):
        raise ValueError(f"generator is {type(generator).__name__}; give {WANTED}")
    if len(generator) != count:
        raise ValueError(f"generator is a list of {len(generator)} for {count} pictures; give {WANTED}")
    if all(is_seed(each) for each in generator):
        return 0, torch.cat([noise_of(int(each), [0], image_shape) for each in generator])
    if all(isinstance(each, torch.Generator) for each in generator):
        return 0, torch.stack([normal(each, image_shape) for each in generator])
    kinds = ", ".join(sorted({type(each).__name__ for each in generator}))
    raise ValueError(f"generator is a list of {kinds}; give {WANTED}")


def is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def normal(generator: torch.Generator, image_shape: tuple[int, int, int]) -> Tensor:
    """The next image's noise, on the CPU, in float64 as `noise_of`."""
    drawn = torch.randn(image_shape, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.cpu()
