"""Where a scene's pixels come from."""

import numpy as np
import pytest

from megadit.data.shapes.drawing import GROUND, INSIDE, coverage, draw, moments
from megadit.data.shapes.scene import COLOURS, SHAPES, Thing


def test_every_shape_can_be_drawn():
    assert tuple(INSIDE) == SHAPES


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_is_flat_on_a_flat_ground(colour):
    picture = draw([Thing("square", colour, 0.5, 0.5, 0.25)], 32)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert (picture[10:22, 10:22] == COLOURS[colour]).all()
    assert (picture[:7] == GROUND).all() and (picture[:, 25:] == GROUND).all()


def test_edges_are_as_covered_as_they_are():
    # A square of half side 0.88 x 10 pixels, about the middle of a pixel's border.
    covered = coverage("square", 16, 16, 10, range(32), range(32))
    assert covered[16, 16] == 1 and covered[16, 2] == 0
    assert covered[16, 7] == pytest.approx(0.8, abs=1 / 8)
    assert covered.sum() == pytest.approx(17.6**2, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi), ("square", 1.76**2), ("ring", 0.7 * np.pi), ("diamond", 2.42)]
)
def test_area_and_centre_of_mass(shape, area):
    assert moments(shape) == (pytest.approx(area, rel=0.01), pytest.approx(0, abs=1e-9))


def test_a_triangle_is_heavier_below():
    assert moments("triangle")[1] == pytest.approx(-1 + 2 / 3 * 1.75, abs=0.01)


def test_size_does_not_change_a_picture():
    things = [Thing("ring", "red", 0.3, 0.4, 0.2), Thing("cross", "white", 0.75, 0.7, 0.15)]
    small, large = draw(things, 32).astype(float), draw(things, 128).astype(float)
    shrunk = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert abs(shrunk - small).mean() < 1.5
