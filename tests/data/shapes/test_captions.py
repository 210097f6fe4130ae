"""Captions say what is asked for, and can be read back."""

import pytest

from megadit.data.shapes.captions import TEMPLATES, caption_of, request_of, said
from megadit.data.shapes.scene import REQUESTS, TASKS, Asked, Request


def test_captions_of_each_task():
    circle, cross = Asked("circle"), Asked("cross")
    assert said(Request("single_object", (circle,))) == "a circle"
    assert said(Request("two_object", (circle, cross))) == "a circle and a cross"
    assert said(Request("counting", (cross,), count=3)) == "three crosses"
    assert said(Request("colors", (Asked("ring", "blue"),))) == "a blue ring"
    assert said(Request("position", (circle, cross), relation="below")) == "a circle below a cross"
    coloured = Request("color_attr", (Asked("ring", "blue"), Asked("square", "white")))
    assert caption_of(coloured, 1) == "a picture of a blue ring and a white square"


def test_every_caption_is_read_back_as_its_request():
    for task in TASKS:
        for request in REQUESTS[task]:
            for template in range(len(TEMPLATES)):
                assert request_of(caption_of(request, template)) == request
    assert request_of("  a   circle ") == Request("single_object", (Asked("circle"),))


@pytest.mark.parametrize("caption", ["a cat", "", "a red circle and a red square", "five circles"])
def test_what_is_no_caption_is_refused(caption):
    with pytest.raises(ValueError, match="is no caption of shapes, such as"):
        request_of(caption)
