"""Tars of pictures, good ones and bad ones of every kind, and what should be said of the bad ones."""

import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


def picture(number, height=256, width=256):
    """Soft blobs of colour that no other number has."""
    colours = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def content(image, kind="JPEG", **options):
    """The bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that says how large it is, and has no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noisy_png(side=64):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return content(Image.fromarray(pixels), "PNG")


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


JPEG = content(picture(10**6))
# Kind -> (the reason that it should be left out for, members without their key).
BAD = {
    "cut": ("truncated", [(".jpg", JPEG[: len(JPEG) // 2]), (".txt", b"cut in half")]),
    "nothing": ("truncated", [(".jpg", b""), (".txt", b"no bytes")]),
    "text": ("not an image", [(".jpg", b"<html>404 Not Found</html>"), (".txt", b"a page")]),
    "blank": ("empty caption", [(".jpg", JPEG), (".txt", b" \n")]),
    "silent": ("no caption", [(".jpg", JPEG)]),
    "tiny": ("too small", [(".jpg", content(picture(1, 40, 300))), (".txt", b"a strip")]),
    "bomb": ("decompression bomb", [(".png", png_header(60_000, 60_000)), (".txt", b"3.6 billion pixels")]),
    "json": ("unreadable json", [(".jpg", JPEG), (".json", b'{"caption": "a dog"')]),
    "weights": ("bad weights", [(".jpg", JPEG), (".json", json.dumps({"captions": ["a"], "weights": [-1]}).encode())]),
    "alone": ("no image", [(".txt", b"a caption without an image")]),
    "latin": ("unreadable caption", [(".jpg", JPEG), (".txt", "Caf\xe9".encode("latin-1"))]),
    "damaged": ("damaged", [(".png", flipped(noisy_png(), 5000)), (".txt", b"a wrong checksum inside")]),
}


@dataclass
class Planted:
    """What should come of tars: keys of good samples, and reasons of bad ones by key."""

    good: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def write_tar(path, members):
    """Members in their order; where each header lies."""
    places = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            places.append(tar.offset)
            tar.addfile(info, io.BytesIO(data))
    return places


def plant(path, planted, first, count, bad=(), pictures=None, twice=False, torn=False, cut=False):
    """A tar of `count` good samples from number `first` on, and between them one of each of the kinds in `bad`.

    twice: the first key comes again at the end. torn: another sample has headers that are none. cut: the last sample is
    cut through. The last three are bad samples, too.
    """
    step = max(1, count // (len(bad) + 1))
    members, waiting = [], list(bad)
    for number in range(first, first + count):
        key = f"{number:06d}"
        image = pictures[number % len(pictures)] if pictures else content(picture(number))
        members += [(f"{key}.jpg", image), caption_of(key, number)]
        planted.good.append(f"{path.name}/{key}")
        if waiting and (number - first) % step == step - 1:
            kind = waiting.pop(0)
            reason, parts = BAD[kind]
            members += [(f"{kind}_{number}{suffix}", data) for suffix, data in parts]
            planted.bad[f"{path.name}/{kind}_{number}"] = reason
    assert not waiting, "too few good samples to stand between"
    if twice:
        members += [(f"{first:06d}.jpg", JPEG), (f"{first:06d}.txt", b"again")]
        planted.bad[f"{path.name}/{first:06d}"] = "duplicate key"
    if torn:
        # In the middle, at the beginning of a sample.
        at = next(i for i in range(len(members) // 2, len(members)) if members[i][0].endswith(".jpg"))
        members[at:at] = [("torn.jpg", JPEG), ("torn.txt", b"torn")]
    if cut:
        members += [("through.txt", b"cut through"), ("through.jpg", JPEG)]
        planted.bad[f"{path.name}/through"] = "truncated archive"
    places = write_tar(path, members)
    data = bytearray(path.read_bytes())
    if torn:
        for place in places[at : at + 2]:
            data[place : place + 512] = b"\xaa" * 512
        planted.bad[f"{path.name}/@{places[at]}"] = "bad tar member"
    path.write_bytes(data[: places[-1] + 512 + len(JPEG) // 2] if cut else data)


def caption_of(key, number):
    """One caption for most, several with weights for some."""
    if number % 7:
        return f"{key}.txt", f"a photo of tree {number}".encode()
    fields = {"captions": [f"a red cat {number}", "an animal"], "weights": [3, 1], "label": number % 10}
    return f"{key}.json", json.dumps(fields).encode()
