"""Requests as captions, and captions as requests."""

from __future__ import annotations

from functools import cache

from megadit.data.shapes.scene import REQUESTS, Asked, Request

TEMPLATES = ("{}", "a picture of {}", "a drawing of {}")
NUMBERS = {2: "two", 3: "three", 4: "four"}


def noun_phrase(thing: Asked) -> str:
    """As a caption names one thing.

    >>> noun_phrase(Asked("ring", "red")), noun_phrase(Asked("cross"))
    ('a red ring', 'a cross')
    """
    return " ".join(word for word in ("a", thing.colour, thing.shape) if word)


def plural(shape: str) -> str:
    """
    >>> plural("cross"), plural("ring")
    ('crosses', 'rings')
    """
    return shape + ("es" if shape.endswith("s") else "s")


def said(request: Request) -> str:
    """The request in words.

    >>> said(Request("position", (Asked("circle"), Asked("cross")), relation="left of"))
    'a circle left of a cross'
    """
    if request.task == "counting":
        return f"{NUMBERS[request.count]} {plural(request.things[0].shape)}"
    phrases = [noun_phrase(thing) for thing in request.things]
    return f" {request.relation or 'and'} ".join(phrases)


def caption_of(request: Request, template: int) -> str:
    """One of its captions."""
    return TEMPLATES[template % len(TEMPLATES)].format(said(request))


@cache
def _requests() -> dict[str, Request]:
    return {
        caption_of(request, template): request
        for requests in REQUESTS.values()
        for request in requests
        for template in range(len(TEMPLATES))
    }


def request_of(caption: str) -> Request:
    """What a caption asks for. Raises ValueError for one that no request has."""
    try:
        return _requests()[" ".join(caption.split())]
    except KeyError:
        raise ValueError(f"{caption!r} is no caption of shapes, such as 'a picture of a red circle'") from None
