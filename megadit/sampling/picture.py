"""Images on paper: each of them, or a grid of them, as one PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.runtime.disk import replace_file


def to_bytes(images_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> 0 to 255, uint8; what lies outside is clipped. Bytes stay as they are."""
    if images_BCHW.dtype == torch.uint8:
        return images_BCHW.cpu()
    return ((images_BCHW.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def shown(images_BCHW: Tensor) -> Tensor:
    """The channels that a PNG can have: one is grey, three are RGB; of another number (latents) the first."""
    return images_BCHW if images_BCHW.shape[-3] in (1, 3) else images_BCHW[..., :1, :, :]


def as_png(image_CHW: Tensor) -> Image.Image:
    """One image of floats in [-1, 1] or of bytes, pixel by pixel; of latents the first channel."""
    pixels = to_bytes(shown(image_CHW))
    return Image.fromarray(pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


def save_picture(image_CHW: Tensor, path: Path) -> None:
    """Write a PNG of one image; a file of this name is whole, whenever it is there."""
    write_png(as_png(image_CHW), path)


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG; a file of this name is whole, whenever it is there."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    replace_file(path, content.getvalue())


def read_picture(path: Path) -> Tensor:
    """The bytes that `save_picture` wrote, [C, H, W]. Raises ValueError naming a file that is no picture."""
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def save_grid(images_BCHW: Tensor, path: Path, columns: int = 10, zoom: int = 6, gap: int = 1) -> None:
    """Write a PNG of the images, of floats in [-1, 1] or of bytes, row by row, each pixel `zoom` wide.

    One channel is grey, three are RGB. Of another number of channels (latents) the first is shown.
    """
    images = to_bytes(shown(images_BCHW))
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 64, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    picture = as_png(sheet)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
