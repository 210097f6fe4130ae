"""Prompts of a score, and what true and wrong pictures make of it."""

from collections import Counter

import pytest
import torch

from megadit.data.shapes.captions import request_of
from megadit.data.shapes.drawing import draw
from megadit.data.shapes.scene import TASKS, Dice, is_heldout, picture_of
from megadit.runtime.seed import stream
from megadit.study.scoring import asks, score


def pictures(asked):
    """True pictures, [B, 3, 64, 64] in [-1, 1]."""
    drawn = [draw(picture_of(ask.request, Dice(stream(0, "true", i))), 64) for i, ask in enumerate(asked)]
    return torch.stack([torch.from_numpy(picture) for picture in drawn]).permute(0, 3, 1, 2) / 127.5 - 1


def test_prompts_of_each_task_say_their_request_and_turn_through_all():
    asked = asks(TASKS, 40, 12)
    assert Counter((ask.request.task, ask.kind) for ask in asked) == {
        **{(task, "trained"): 40 for task in TASKS},
        **{(task, "heldout"): 12 for task in TASKS[1:]},
    }
    for ask in asked:
        assert request_of(ask.prompt) == ask.request
        assert is_heldout(ask.request) == (ask.kind == "heldout")
    assert len({ask.request for ask in asked if ask.request.task == "colors"}) == 30 + 6
    assert asks(TASKS, 40, 12) == asked and asks(TASKS, 20, 0)[:20] == asked[:20]


def test_prompts_of_a_few_shapes_name_no_other():
    few = ("square", "triangle", "ring")
    asked = asks(("single_object", "position"), 40, 12, few)
    assert Counter(ask.request.task for ask in asked) == {"single_object": 40, "position": 52}
    assert {thing.shape for ask in asked for thing in ask.request.things} == {*few}


def test_true_pictures_score_one_and_one_wrong_one_counts_in_its_task():
    asked = asks(("colors", "position"), 5, 2)
    drawn = pictures(asked)
    result = score(drawn, asked)
    assert (result["score"], result["score_heldout"], result["faults"]) == (1.0, 1.0, {})
    drawn[0] = -1  # no thing at all
    result = score(drawn, asked)
    assert result["score"] == pytest.approx((4 / 5 + 1) / 2) and result["score_heldout"] == 1.0
    assert result["tasks"]["colors"]["trained"] == {"right": 4, "asked": 5}
    assert result["faults"] == {"0 things in place of 1": 1}


def test_a_task_without_held_out_combinations_has_no_such_score():
    asked = asks(("single_object",), 6, 4)
    assert len(asked) == 6 and score(pictures(asked), asked)["score_heldout"] is None
