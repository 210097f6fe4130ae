"""Where the pixels of a sheet come from."""

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.sampling.picture import save_grid, to_bytes


def images(count, channels):
    """Images of 2 x 3 pixels, all different."""
    return torch.rand(count, channels, 2, 3, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def test_minus_one_to_one_become_bytes_and_the_rest_is_clipped():
    values = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.2, 1.0, 7.0], dtype=torch.float64)
    assert to_bytes(values).tolist() == [0, 0, 64, 128, 153, 255, 255]
    assert to_bytes(values).dtype == torch.uint8


@pytest.mark.parametrize(("count", "columns", "rows"), [(5, 2, 3), (4, 2, 2), (1, 1, 1), (2, 4, 1)])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (8, "L")], ids=["grey", "rgb", "latents"])
def test_every_pixel_is_in_its_place(tmp_path, channels, mode, count, columns, rows):
    drawn, zoom, gap = images(count, channels), 3, 2
    path = tmp_path / "sheet.png"
    save_grid(drawn, path, columns, zoom, gap)
    with Image.open(path) as picture:
        assert (picture.mode, picture.format) == (mode, "PNG")
        pixels = np.asarray(picture)
    expected = np.full((rows * (2 + gap) + gap, columns * (3 + gap) + gap, 3), 64, dtype=np.uint8)
    for i, image in enumerate(drawn):
        for row in range(2):
            for column in range(3):
                values = image[:, row, column] if channels == 3 else image[:1, row, column].expand(3)
                place = gap + i // columns * (2 + gap) + row, gap + i % columns * (3 + gap) + column
                expected[place] = [round((value + 1) * 127.5) for value in values.tolist()]
    expected = expected.repeat(zoom, 0).repeat(zoom, 1)
    assert np.array_equal(pixels if channels == 3 else pixels[:, :, None].repeat(3, 2), expected)
