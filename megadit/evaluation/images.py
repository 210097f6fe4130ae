"""Images in folders, and images in tensors, as RGB pictures of Pillow's: what feature extractors read."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from megadit.data.images import MAX_PIXELS, SUFFIXES, decode
from megadit.data.quarantine import Unusable
from megadit.sampling.picture import to_bytes


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name; folders in it are not searched. Raises ValueError where there is none."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix[1:].lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}") from error
    if not paths:
        raise ValueError(f"{folder}: no images in it (files named {', '.join(SUFFIXES)}; its folders are not searched)")
    return paths


def open_rgb(path: Path) -> Image.Image:
    """An image file in RGB, upright. Raises ValueError naming a file that is no whole image."""
    try:
        return decode(path.read_bytes(), 1, MAX_PIXELS)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Unusable as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def to_rgb(images_BCHW: Tensor) -> list[Image.Image]:
    """Images of one or three channels in [-1, 1] as RGB."""
    assert images_BCHW.shape[1] in (1, 3), "pictures, not latents"
    pixels_BHWC = to_bytes(images_BCHW).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side without a gap, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (width * columns, height * rows))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * width, i // columns * height))
    return whole
