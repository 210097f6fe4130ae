"""From an image file's bytes to RGB pixels: what is odd about it put right, what is bad about it named."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from megadit.data.quarantine import Unusable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of the others, some start programs, or mean several things
SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 80_000_000  # just below where Pillow begins to warn
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM")


def bytes_limit(max_pixels: int) -> int:
    """More bytes than an image of so many pixels takes, were it stored as 16-bit RGBA and not compressed."""
    return 8 * max_pixels + (1 << 20)


def allow(max_pixels: int) -> None:
    """Have Pillow, in all of this process, open images of so many pixels; its own limit is about 180 million."""
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)


def decode(content: bytes, min_size: int, max_pixels: int) -> Image.Image:
    """The image in RGB, upright.

    EXIF's orientation is heeded, transparency is put on white, 16 bits become 8, an animation is its first frame.
    min_size: pixels of the shorter side. Raises Unusable.
    """
    image = _open(content, max_pixels)
    if min(image.size) < min_size:
        raise Unusable("too small", f"{image.height} x {image.width} pixels, of {min_size} that the shorter side needs")
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise Unusable("decompression bomb", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise whatever its arithmetic comes to
        raise _fault(content, error) from error
    try:
        return _in_rgb(_upright(image))
    except MemoryError:
        raise
    except Exception as error:
        raise Unusable("damaged", str(error)) from error


def _open(content: bytes, max_pixels: int) -> Image.Image:
    """Its header alone: decoding comes after the number of pixels was looked at."""
    if len(content) > bytes_limit(max_pixels):
        raise Unusable("decompression bomb", f"{len(content)} bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unusable("decompression bomb", str(error)) from error
    except UnidentifiedImageError as error:
        if not content or content.startswith(_MAGIC):
            raise Unusable("truncated", f"{len(content)} bytes") from error
        raise Unusable("not an image", f"it begins with {content[:12]!r}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _fault(content, error) from error
    if image.width * image.height > max_pixels:
        size = f"{image.height} x {image.width} pixels, of {max_pixels} that are allowed"
        raise Unusable("decompression bomb", size)
    return image


def _fault(content: bytes, error: Exception) -> Unusable:
    if "too large" in str(error):  # a PNG's text that unpacks to more than Pillow takes
        return Unusable("decompression bomb", str(error))
    return Unusable("truncated" if "truncated" in str(error) or _is_cut(content) else "damaged", str(error))


def _is_cut(content: bytes) -> bool:
    """Whether a file lacks what its format has at the end."""
    if content.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in content[-1024:]
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-1024:]
    if content.startswith(b"RIFF"):
        return len(content) < 8 or len(content) < 8 + int.from_bytes(content[4:8], "little")
    return not content.endswith(b";") if content.startswith(b"GIF8") else False


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read says nothing about the orientation
        return image


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion would cut them off at 255.
        values_HW = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")
