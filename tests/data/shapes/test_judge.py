"""The judge: right on true pictures of every request, and not taken in by planted mistakes."""

from collections import Counter

import numpy as np
import pytest

from megadit.data.shapes.drawing import GROUND, draw
from megadit.data.shapes.judge import UNKNOWN, judge, read
from megadit.data.shapes.scene import COLOURS, REQUESTS, SHAPES, TASKS, Asked, Dice, Request, Thing, picture_of
from megadit.runtime.seed import stream
from tests.data.shapes.mistakes import MISTAKES

# In continuous integration fewer; a drill judges them all.
PICTURES = [200, pytest.param(2000, marks=pytest.mark.drill)]
AT_32 = ("single_object", "colors", "position")
CASES = [(64, task) for task in TASKS] + [(32, task) for task in AT_32]


def asked(kind, task, number):
    """(dice, request) number so many of a task; held-out ones are among them."""
    dice = Dice(stream(0, "judge", kind, task, number))
    return dice, dice.choice(REQUESTS[task])


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize(("size", "task"), CASES)
def test_true_pictures_are_right(size, task, pictures):
    wrong = Counter()
    for number in range(pictures):
        dice, request = asked("true", task, number)
        verdict = judge(draw(picture_of(request, dice), size), request)
        wrong[verdict.why] += not verdict.right
    assert wrong.total() <= 0.005 * pictures, wrong.most_common(5)


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize(("size", "task"), CASES)
def test_planted_mistakes_are_caught(size, task, pictures):
    missed = Counter()
    for number in range(pictures):
        dice, request = asked("mistake", task, number)
        plant = MISTAKES[task][number % len(MISTAKES[task])]
        missed[plant.__name__] += judge(plant(request, dice, size), request).right
    assert missed.total() <= 0.01 * pictures, missed


@pytest.mark.parametrize("size", [32, 64, 96])
def test_it_reads_shape_colour_place_and_size(size):
    for shape in SHAPES:
        for colour in COLOURS:
            there = Thing(shape, colour, 0.45, 0.6, 0.2)
            (found,) = read(draw([there], size))
            assert found[:2] == there[:2]
            assert np.allclose(found[2:], there[2:], atol=0.02), (found, there)


def test_noise_does_not_disturb_it():
    noise = np.random.default_rng(0)
    right = []
    for number in range(300):
        dice, request = asked("noise", "color_attr", number)
        picture = draw(picture_of(request, dice), 64) + noise.normal(0, 8, (64, 64, 3))
        right.append(judge(picture.round().clip(0, 255).astype(np.uint8), request).right)
    assert np.mean(right) > 0.99


def test_nothing_noise_and_a_colour_that_is_none_are_no_things():
    assert read(np.full((32, 32, 3), GROUND, dtype=np.uint8)) == []
    static = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert not any(judge(static, request).right for request in REQUESTS["single_object"])
    (pink,) = read(
        np.where(draw([Thing("circle", "white", 0.5, 0.5, 0.3)], 32) > 128, [255, 120, 190], GROUND).astype(np.uint8)
    )
    assert (pink.shape, pink.colour) == ("circle", UNKNOWN)


def test_things_that_touch_are_one_of_no_shape():
    touching = [Thing("circle", "red", 0.35, 0.5, 0.17), Thing("square", "red", 0.65, 0.5, 0.17)]
    (found,) = read(draw(touching, 64))
    assert found.shape == UNKNOWN


def test_a_verdict_says_why():
    request = Request("color_attr", (Asked("circle", "red"), Asked("square", "blue")))
    circle, square = Thing("circle", "blue", 0.25, 0.5, 0.15), Thing("square", "red", 0.75, 0.5, 0.15)
    assert judge(draw([circle, square], 64), request) == (False, "shows blue circle, red square")
    assert judge(draw([circle], 64), request) == (False, "1 things in place of 2")
    beside = Request("position", (Asked("square"), Asked("circle")), relation="left of")
    assert judge(draw([circle, square], 64), beside) == (False, "the first is right of the second")
