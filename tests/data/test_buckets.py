"""Aspect-ratio buckets: which there are, which an image takes, and how it is brought to one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from megadit.data.buckets import Bucket, BucketRule, choose, cover, fit
from tests.data.planted import picture


@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=3),
    st.sampled_from([8, 16, 32, 64]),
    st.floats(1, 4),
    st.booleans(),
)
def test_every_bucket_keeps_the_rule_and_lies_across_from_its_mirror(sides, multiple, max_aspect, square):
    rule = BucketRule(tuple(side * multiple for side in sides), multiple, max_aspect, square)
    buckets = rule.buckets()
    assert buckets == sorted(buckets)
    shapes = {(bucket.height, bucket.width) for bucket in buckets}
    assert len(shapes) == len(buckets), "no shape twice"
    assert shapes == {(width, height) for height, width in shapes}
    assert {(side, side) for side in rule.resolutions} <= shapes
    for bucket in buckets:
        assert bucket.height % multiple == bucket.width % multiple == 0
        assert max(bucket.height / bucket.width, bucket.width / bucket.height) <= (1 if square else max_aspect)
        assert bucket.height * bucket.width <= bucket.resolution**2
        assert bucket.resolution in rule.resolutions


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=200)
def test_an_image_takes_the_nearest_ratio_at_the_largest_resolution_that_it_fills(height, width):
    buckets = BucketRule((128, 256, 512), 16).buckets()
    chosen = choose(buckets, height, width)

    def distance(bucket):
        return abs(math.log(bucket.width / bucket.height) - math.log(width / height))

    peers = [bucket for bucket in buckets if bucket.resolution == chosen.resolution]
    assert distance(chosen) <= min(map(distance, peers)) + 1e-12
    fills = height >= chosen.height and width >= chosen.width
    assert fills or chosen.resolution == 128
    for resolution in (256, 512):
        if resolution > chosen.resolution:
            nearest = min((bucket for bucket in buckets if bucket.resolution == resolution), key=distance)
            assert height < nearest.height or width < nearest.width


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_cover_covers_and_one_side_fits_exactly(height, width):
    bucket = Bucket(256, 224, 288)
    scaled = cover(height, width, bucket)
    assert scaled[0] >= bucket.height and scaled[1] >= bucket.width
    assert scaled[0] == bucket.height or scaled[1] == bucket.width
    # The ratio is kept to the nearest pixel of the longer side.
    scale = max(bucket.height / height, bucket.width / width)
    assert abs(scaled[0] - scale * height) <= 0.5 + 1e-9 and abs(scaled[1] - scale * width) <= 0.5 + 1e-9


@pytest.mark.parametrize("size", [(300, 400), (511, 300), (1200, 800), (130, 170), (226, 288)])
def test_fit_is_pillows_own_resize_and_centre_crop(size):
    image, bucket = picture(3, *size), Bucket(256, 224, 288)
    height, width = cover(*size, bucket)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - 288) // 2, (height - 224) // 2
    expected = np.asarray(scaled.crop((left, top, left + 288, top + 224)), dtype=int)
    difference = np.abs(np.asarray(fit(image, bucket), dtype=int) - expected)
    assert difference.max() <= 2, "a step for each of two passes, where they round another way"
    assert difference.mean() < 0.03


@pytest.mark.parametrize("size", [(300, 400), (511, 300), (64, 1000)])
def test_fit_agrees_with_pillows_imageops_up_to_a_pixel_of_the_crop(size):
    image, bucket = picture(4, *size), Bucket(256, 224, 288)
    ours = np.asarray(fit(image, bucket), dtype=int)
    theirs = np.asarray(ImageOps.fit(image, (288, 224), Image.Resampling.LANCZOS), dtype=int)
    assert np.abs(ours - theirs).mean() < 2


def test_an_image_of_the_buckets_size_stays_as_it_is():
    image = picture(5, 224, 288)
    assert fit(image, Bucket(256, 224, 288)).tobytes() == image.tobytes()


def test_a_long_strip_is_not_scaled_as_a_whole():
    """Ten times the longest side that Pillow would take, were the strip scaled before it is cut."""
    assert fit(Image.new("RGB", (2_000_000, 4)), Bucket(512, 512, 512)).size == (512, 512)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (((250,), 16), "resolution 250 is not a multiple of 16, the pixels of a patch; use 256"),
        (((3,), 16), "use 16"),
        (((), 16), "no resolution"),
        (((256,), 16, 0.5), "the largest aspect ratio is 0.5; it must be 1 or more"),
    ],
)
def test_what_makes_no_buckets_is_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        BucketRule(*fields)
