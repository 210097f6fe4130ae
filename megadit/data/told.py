"""What is told of an image: captions with weights, and the number of its class; from text, JSON or columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadit.data.quarantine import Unusable


@dataclass(frozen=True)
class Told:
    """captions: as written, perhaps none. weights: how often each is drawn, relative to the others, none of them 0."""

    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    label: int | None = None

    def cleaned(self) -> Told:
        """Without captions that are blank. Raises Unusable when there is none, or none is left."""
        if not self.captions:
            raise Unusable("no caption")
        kept = [(text.strip(), weight) for text, weight in zip(self.captions, self.weights, strict=True)]
        kept = [(text, weight) for text, weight in kept if text]
        if not kept:
            raise Unusable("empty caption")
        return Told(tuple(text for text, _ in kept), tuple(weight for _, weight in kept), self.label)


def of_fields(fields: Mapping[str, Any]) -> Told:
    """From `caption` (a text or several) or `captions`, `weights` (one a caption) and `label`; others are ignored.

    A caption of weight 0 is never drawn, and left out. Raises Unusable for fields of another form.

    >>> of_fields({"captions": ["a cat", "an animal", "no"], "weights": [3, 1, 0], "label": 7})
    Told(captions=('a cat', 'an animal'), weights=(3.0, 1.0), label=7)
    """
    captions = fields.get("captions")
    if captions is None:
        captions = fields.get("caption")
    captions = [] if captions is None else [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise Unusable("unreadable json", "captions are neither a text nor a list of texts")
    try:
        for caption in captions:
            caption.encode()  # JSON can spell halves of surrogate pairs, which are no text
    except UnicodeEncodeError as error:
        raise Unusable("unreadable caption", str(error)) from error
    label = fields.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**63):
        raise Unusable("unreadable json", f"label {label!r:.50} is not a whole number from 0 on")
    weights = _weights(fields.get("weights"), len(captions))
    drawn = [(caption, weight) for caption, weight in zip(captions, weights, strict=True) if weight > 0]
    return Told(tuple(caption for caption, _ in drawn), tuple(weight for _, weight in drawn), label)


def _weights(weights: Any, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if not isinstance(weights, list) or len(weights) != count:
        raise Unusable("bad weights", f"not a list of {count}, one a caption")
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError) as error:
        raise Unusable("bad weights", str(error)) from error
    if not all(weight == 0 or 1e-30 < weight < 1e30 for weight in numbers) or (count and sum(numbers) == 0):
        raise Unusable("bad weights", "weights must be finite, not negative, and not all 0")
    return numbers


def of_json(content: bytes) -> Told:
    """From a JSON object. Raises Unusable."""
    return of_fields(json_object(content))


def json_object(content: bytes) -> dict[str, Any]:
    """Raises Unusable for what is no JSON object."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unusable("unreadable json", str(error)) from error
    if not isinstance(fields, dict):
        raise Unusable("unreadable json", "not an object, such as {...}")
    return fields


def of_text(content: bytes) -> Told:
    """From a text that is one caption. Raises Unusable."""
    try:
        return Told((content.decode("utf-8-sig"),), (1.0,))
    except UnicodeDecodeError as error:
        raise Unusable("unreadable caption", str(error)) from error


def of_sidecars(text: bytes | None, fields: bytes | None) -> Told:
    """From either or both; what JSON does not say, the text does. Raises Unusable.

    >>> of_sidecars(b"a dog", b'{"label": 3}')
    Told(captions=('a dog',), weights=(1.0,), label=3)
    """
    told = Told() if fields is None else of_json(fields)
    if told.captions or text is None:
        return told
    from_text = of_text(text)
    return Told(from_text.captions, from_text.weights, told.label)
