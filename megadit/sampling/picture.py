"""Images on paper: a grid of them as one PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def to_bytes(images_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> 0 to 255, uint8; what lies outside is clipped."""
    return ((images_BCHW.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_grid(images_BCHW: Tensor, path: Path, columns: int = 10, zoom: int = 6, gap: int = 1) -> None:
    """Write a PNG of the images, row by row, each pixel `zoom` wide. One channel is grey, three are RGB.

    Of another number of channels (latents) the first is shown.
    """
    images = to_bytes(images_BCHW)
    images = images if images.shape[1] == 3 else images[:, :1]
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 64, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    pixels = sheet.squeeze(0).numpy() if channels == 1 else sheet.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
