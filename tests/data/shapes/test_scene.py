"""Scenes: functions of their index, that show what is asked for and never what is held out."""

from collections import Counter
from itertools import combinations

import pytest

from megadit.data.shapes.scene import (
    COLOURS,
    COUNTS,
    HELDOUT,
    RELATIONS,
    REQUESTS,
    SHAPES,
    TASKS,
    TRAINED,
    Asked,
    Request,
    Thing,
    are_apart,
    colouring_is_heldout,
    company_is_heldout,
    is_clear,
    is_heldout,
    pair_is_heldout,
    relation_is_heldout,
    relation_of,
    scene,
    shows_heldout,
)

SCENES = [scene("train", index) for index in range(6000)]


def test_requests_are_every_combination_and_each_is_trained_or_held_out():
    counts = {task: len(REQUESTS[task]) for task in TASKS}
    assert counts == {
        **{"single_object": 6, "two_object": 30, "counting": 18, "colors": 36, "position": 120},
        "color_attr": 30 * 30,
    }
    for task in TASKS:
        assert set(TRAINED[task]).isdisjoint(HELDOUT[task])
        assert set(TRAINED[task]) | set(HELDOUT[task]) == set(REQUESTS[task])
        assert (len(HELDOUT[task]) > 0) == (task != "single_object")


def test_what_is_held_out_is_spread_over_shapes_colours_counts_and_relations():
    pairs = Counter(shape for shape in SHAPES for colour in COLOURS if pair_is_heldout(shape, colour))
    assert set(pairs.values()) == {1} and len(pairs) == 6
    assert Counter(c for s in SHAPES for c in COLOURS if pair_is_heldout(s, c)) == dict.fromkeys(COLOURS, 1)
    company = Counter(a for a in SHAPES for b in SHAPES if a != b and company_is_heldout(a, b))
    assert company == dict.fromkeys(SHAPES, 1)
    lacking = Counter(request.count for request in HELDOUT["counting"])
    assert lacking == dict.fromkeys(COUNTS, 2)
    seen = Counter((r.things[0].shape, r.relation) for r in TRAINED["position"])
    assert len(seen) == len(SHAPES) * len(RELATIONS) and min(seen.values()) >= 2


def test_a_relation_is_held_out_whichever_is_named_first():
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for a, b in combinations(SHAPES, 2):
        for relation in RELATIONS:
            assert relation_is_heldout(a, relation, b) == relation_is_heldout(b, mirrored[relation], a)
    first, second = Asked("circle", "green"), Asked("cross", "blue")
    assert colouring_is_heldout(first, second) == colouring_is_heldout(second, first)


def test_a_scene_is_a_function_of_split_and_index():
    assert scene("train", 17) == scene("train", 17)
    assert (
        len({scene("train", index) for index in range(500)} | {scene("heldout", index) for index in range(500)}) == 1000
    )
    far = scene("train", 2**40 + 1)
    assert far == scene("train", 2**40 + 1)


def test_tasks_take_turns():
    assert [s.request.task for s in SCENES[:12]] == [*TASKS, *TASKS]
    some = ("position", "colors")
    assert [scene("train", index, some).request.task for index in range(4)] == [*some, *some]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_scene_shows_or_names_what_is_held_out(split):
    for index in range(1500):
        request, things = scene(split, index)
        assert not is_heldout(request) and not shows_heldout(things)


def test_scenes_show_every_trained_request():
    shown = Counter(s.request for s in SCENES)
    for task in TASKS[:-1]:
        assert set(shown) >= set(TRAINED[task])
    assert sum(request.task == "color_attr" for request in shown) > 0.8 * len(TRAINED["color_attr"])


def test_things_are_whole_apart_and_as_asked():
    for request, things in SCENES:
        wanted = [asked for asked in request.things for _ in range(request.count)]
        assert [thing.shape for thing in things] == [asked.shape for asked in wanted]
        assert all(a.colour in (None, thing.colour) for a, thing in zip(wanted, things, strict=True))
        assert all(are_apart(a, b) for a, b in combinations(things, 2))
        for thing in things:
            assert thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        if request.relation:
            assert is_clear(*things) and relation_of(*things) == request.relation


def test_relations_are_those_of_the_axis_on_which_things_are_further_apart():
    middle = Thing("circle", "red", 0.5, 0.5, 0.1)
    places = {"left of": (0.1, 0.6), "right of": (0.9, 0.4), "above": (0.4, 0.1), "below": (0.6, 0.9)}
    for relation, (x, y) in places.items():
        thing = middle._replace(x=x, y=y)
        assert relation_of(thing, middle) == relation and is_clear(thing, middle)
    assert not is_clear(middle._replace(x=0.2, y=0.25), middle)


def test_held_out_requests_name_a_combination():
    assert is_heldout(Request("colors", (Asked("circle", "red"),)))
    assert is_heldout(Request("two_object", (Asked("circle"), Asked("cross"))))
    assert not is_heldout(Request("single_object", (Asked("circle"),)))
