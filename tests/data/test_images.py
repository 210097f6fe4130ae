"""Image files of every kind to upright RGB, and what is wrong with the bad ones."""

import io

import numpy as np
import pytest
from PIL import Image

from megadit.data.images import MAX_PIXELS, allow, decode
from megadit.data.quarantine import Unusable
from tests.data.planted import JPEG, content, flipped, noisy_png, picture, png_header

PICTURE = picture(0, 48, 64)


def pixels(data):
    image = decode(data, 1, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image, dtype=int)


def near(a, b, tolerance=0):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= tolerance


def reason(data, min_size=1, max_pixels=MAX_PIXELS):
    with pytest.raises(Unusable) as bad:
        decode(data, min_size, max_pixels)
    return bad.value.reason


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_come_back_as_they_were(kind):
    assert near(pixels(content(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {}))), PICTURE)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_a_jpeg_is_what_pillow_reads(options):
    data = content(PICTURE, "JPEG", **options)
    assert near(pixels(data), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exifs_orientation_is_heeded(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = content(PICTURE, kind, exif=exif, **lossless)
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 6: lambda a: np.rot90(a, -1),
             5: lambda a: a.swapaxes(0, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    stored = np.asarray(Image.open(io.BytesIO(data)), dtype=int)
    assert near(pixels(data), turns[orientation](stored))


def test_cmyk_and_grey_become_rgb():
    assert near(pixels(content(PICTURE.convert("CMYK"), "JPEG", quality=100)), PICTURE, 24)
    grey = PICTURE.convert("L")
    assert near(pixels(content(grey, "PNG")), np.stack([np.asarray(grey)] * 3, -1))
    assert set(np.unique(pixels(content(grey.point(lambda value: 255 * (value > 99)).convert("1"), "PNG")))) == {0, 255}


def test_transparency_is_put_on_white():
    alpha = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    rgba = PICTURE.copy()
    rgba.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = np.asarray(PICTURE) * share + 255 * (1 - share)
    assert near(pixels(content(rgba, "PNG")), np.rint(expected), 1)
    grey = rgba.convert("LA")
    expected = np.asarray(grey)[..., :1] * share + 255 * (1 - share)
    assert near(pixels(content(grey, "PNG")), np.rint(np.broadcast_to(expected, (48, 64, 3))), 1)


def test_palettes_with_and_without_a_transparent_colour():
    palette = PICTURE.quantize(16)
    assert near(pixels(content(palette, "PNG")), palette.convert("RGB"))
    expected = np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB")))
    assert near(pixels(content(palette, "PNG", transparency=3)), expected)


def test_sixteen_bits_are_scaled_not_cut_off():
    values = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    got = pixels(content(Image.fromarray(values), "PNG"))
    assert near(got, np.rint(values / 257)[..., None].repeat(3, -1))


def test_every_value_of_sixteen_bits_is_rounded_to_the_nearest():
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    got = pixels(content(Image.fromarray(values), "PNG"))
    assert near(got, np.rint(values / 257)[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = content(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert near(pixels(data), [255, 0, 0], 3)


def test_exif_that_cannot_be_read_says_nothing():
    data = content(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert near(pixels(data), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.95])
def test_what_ends_too_soon_is_truncated_wherever_it_is_cut(kind, share):
    data = content(picture(1, 200, 200), kind)
    assert reason(data[: int(share * len(data))]) == "truncated"


def test_damage_inside_is_told_from_a_cut():
    assert reason(flipped(noisy_png(), 5000)) == "damaged"


@pytest.mark.parametrize("data", [b"<html>404</html>", b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4 ..."])
def test_what_is_no_image(data):
    assert reason(data) == "not an image"


def test_a_tiff_is_not_read():
    assert reason(content(PICTURE, "TIFF")) == "not an image"


def test_sizes_are_looked_at_before_anything_is_decoded():
    assert reason(png_header(60_000, 60_000)) == "decompression bomb"
    assert reason(png_header(8000, 10_001)) == "decompression bomb", "just over the limit"
    assert reason(png_header(8000, 10_000)) != "decompression bomb", "just at the limit: it has no pixels"
    assert reason(png_header(60_000, 60_000), max_pixels=10**12) == "decompression bomb", "Pillow's own limit"
    assert reason(JPEG, max_pixels=256 * 256 - 1) == "decompression bomb"
    assert reason(JPEG, min_size=257) == "too small"
    assert decode(JPEG, 256, 256 * 256).size == (256, 256)


def test_more_pixels_than_pillow_opens_can_be_allowed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(JPEG) == "decompression bomb"
    allow(256 * 256)
    assert decode(JPEG, 256, 256 * 256).size == (256, 256)
    allow(100)
    assert decode(JPEG, 256, 256 * 256).size == (256, 256), "what was allowed stays so"


def test_a_text_that_unpacks_to_too_much_is_a_bomb():
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 10), zip=True)
    assert reason(content(PICTURE, "PNG", pnginfo=info)) == "decompression bomb"
