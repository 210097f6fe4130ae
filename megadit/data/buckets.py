"""Buckets: the few shapes that images are brought to, of about the same number of pixels and several aspect ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape, in pixels. resolution: the side of the square that it replaces."""

    resolution: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class BucketRule:
    """Which buckets there are.

    resolutions: sides in pixels. multiple: of every side, the pixels of a latent cell times the cells of a patch.
    max_aspect: of the longer to the shorter side. square: squares alone.
    """

    resolutions: tuple[int, ...]
    multiple: int
    max_aspect: float = 2.0
    square: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the resolution that does not fit."""
        if not self.resolutions:
            raise ValueError("no resolution: give at least one, such as 256")
        for resolution in self.resolutions:
            if resolution <= 0 or resolution % self.multiple:
                near = max(self.multiple, round(resolution / self.multiple) * self.multiple)
                raise ValueError(
                    f"resolution {resolution} is not a multiple of {self.multiple}, the pixels of a patch; use {near}"
                )
        if not self.max_aspect >= 1:
            raise ValueError(f"the largest aspect ratio is {self.max_aspect:g}; it must be 1 or more")

    def buckets(self) -> list[Bucket]:
        """All of them, sorted, without repeats: where two resolutions meet in a shape, it is the smaller one's.

        >>> [str(bucket) for bucket in BucketRule((256,), 32).buckets()]
        ['192x320', '224x288', '256x256', '288x224', '320x192']
        >>> [str(bucket) for bucket in BucketRule((256, 512), 32, square=True).buckets()]
        ['256x256', '512x512']
        """
        found: dict[tuple[int, int], Bucket] = {}
        for resolution in sorted(set(self.resolutions)):
            for short, long in _shapes(resolution, self.multiple, 1.0 if self.square else self.max_aspect):
                for height, width in ((short, long), (long, short)):
                    found.setdefault((height, width), Bucket(resolution, height, width))
        return sorted(found.values())

    def choose(self, height: int, width: int) -> Bucket:
        """The bucket of an image of this size: of the nearest aspect ratio, at the largest resolution that it fills.

        An image that fills none is enlarged to the smallest.

        >>> rule = BucketRule((256, 512), 64)
        >>> [str(rule.choose(*size)) for size in ((300, 300), (600, 600), (100, 90), (600, 1000), (3000, 100))]
        ['256x256', '512x512', '256x256', '384x640', '320x192']
        """
        return choose(self.buckets(), height, width)


def _shapes(resolution: int, multiple: int, max_aspect: float) -> list[tuple[int, int]]:
    """(short, long) sides: none has more pixels than the square, so that the square needs the most memory."""
    shapes = []
    for short in range(resolution, 0, -multiple):
        long = resolution * resolution // short // multiple * multiple
        if long > max_aspect * short:
            break
        shapes.append((short, long))
    return shapes


def choose(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """As `BucketRule.choose`, of sorted buckets."""
    for resolution in sorted({bucket.resolution for bucket in buckets}, reverse=True):
        nearest = min(
            (bucket for bucket in buckets if bucket.resolution == resolution),
            key=lambda bucket: abs(math.log(bucket.width / bucket.height * height / width)),
        )
        if height >= nearest.height and width >= nearest.width:
            return nearest
    return nearest


def cover(height: int, width: int, bucket: Bucket) -> tuple[int, int]:
    """(height, width) of the image scaled to cover the bucket and no more, its aspect ratio kept.

    >>> cover(300, 400, Bucket(256, 256, 256)), cover(400, 300, Bucket(256, 224, 288))
    ((256, 341), (384, 288))
    """
    if bucket.width * height >= bucket.height * width:  # the width is what decides
        return max(bucket.height, round(height * bucket.width / width)), bucket.width
    return bucket.height, max(bucket.width, round(width * bucket.height / height))


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The image scaled to cover the bucket (Lanczos, antialiased), and its middle."""
    height, width = cover(image.height, image.width, bucket)
    top, left = (height - bucket.height) // 2, (width - bucket.width) // 2
    if (width, height) == image.size:
        return image.crop((left, top, left + bucket.width, top + bucket.height))
    # The part that is kept, in pixels of the image: a strip that is scaled first could take any amount of memory.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + bucket.width) * x, (top + bucket.height) * y)
    return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box)
