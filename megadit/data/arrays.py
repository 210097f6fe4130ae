"""A data set in one `.npz` file: `images` [N, H, W] or [N, C, H, W] and `captions` [N], an array of text.

The smallest way to train on something of one's own. Nothing is unpickled: captions must be a unicode array. With class
conditioning the array `labels` [N], of integers, stands in for the captions.
"""

from __future__ import annotations

import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megadit.encoders.condition import Conditioning
from megadit.runtime.seed import stream

HELDOUT_FRACTION = 10


@cache
def _read(path: str, conditioning: Conditioning) -> tuple[Tensor, list[str]]:
    name, wanted, kinds = ("captions", "unicode", "U") if conditioning == "text" else ("labels", "integers", "iu")
    try:
        file = np.load(Path(path).expanduser(), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single array, not an archive of them")
        with file:
            images, told = torch.from_numpy(file["images"].astype(np.float32)), file[name]
    except OSError as error:
        raise ValueError(f"data.path={path}: {error.strerror or error}") from error
    except KeyError as error:
        raise ValueError(f"data.path={path}: {error.args[0]} (the arrays needed are images and {name})") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data.path={path}: not a readable .npz file ({error})") from error
    shapes_fit = images.ndim in (3, 4) and told.shape == (len(images),)
    if not shapes_fit or told.dtype.kind not in kinds:
        raise ValueError(
            f"data.path={path}: images must be [N, H, W] or [N, C, H, W] and {name} [N] {wanted}; "
            f"got images {tuple(images.shape)} and {name} {told.shape} of type {told.dtype}"
        )
    if len(told) < 2:
        raise ValueError(f"data.path={path}: {len(told)} samples; at least 2 are needed, for one is held out")
    if not images.isfinite().all():
        raise ValueError(f"data.path={path}: images hold NaN or infinity")
    if images.abs().max() > 20:
        raise ValueError(f"data.path={path}: images reach {images.abs().max():g}; scale them to about -1 to 1")
    if conditioning == "class" and told.min() < 0:
        raise ValueError(f"data.path={path}: labels go down to {told.min()}; classes count from 0")
    captions = [str(caption) for caption in told]
    empty = [i for i, caption in enumerate(captions) if not caption.strip()]
    if empty:
        raise ValueError(f"data.path={path}: {len(empty)} captions are empty, the first at index {empty[0]}")
    return images if images.ndim == 4 else images[:, None], captions


class Arrays:
    """One split, "train" or "heldout" (one sample in ten)."""

    is_endless = False

    def __init__(self, split: str, path: str, conditioning: Conditioning = "text") -> None:
        """With class conditioning a caption is the label. Raises ValueError naming the file and the array at fault."""
        images, captions = _read(path, conditioning)
        order = torch.randperm(len(captions), generator=stream(0, "split"))
        num_heldout = max(1, len(captions) // HELDOUT_FRACTION)
        chosen = order[num_heldout:] if split == "train" else order[:num_heldout]
        self.images_NCHW, self.captions = images[chosen], [captions[i] for i in chosen.tolist()]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.images_NCHW.shape[1:])  # type: ignore[return-value]

    def images(self, ids_B: Tensor) -> Tensor:
        """[B, C, H, W] as stored."""
        return self.images_NCHW[ids_B]

    def caption(self, index: int, generator: torch.Generator) -> str:
        """The sample's one caption."""
        return self.captions[index]

    def corpus(self) -> list[str]:
        """The split's captions."""
        return self.captions

    def prompts(self, count: int) -> list[str]:
        """The first `count` captions, repeated if there are fewer."""
        return [self.captions[i % len(self)] for i in range(count)]
