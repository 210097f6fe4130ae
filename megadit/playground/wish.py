"""What the page asks to be drawn, checked before anything is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from megadit.sampling.config import SampleConfig

SAMPLERS: tuple[str, ...] = get_args(get_type_hints(SampleConfig)["sampler"])
MOST_STEPS, MOST_GUIDANCE, MOST_LETTERS = 1000, 100.0, 2000
MOST_SEED = 2**53 - 1  # whole numbers that JavaScript has exactly


@dataclass(frozen=True)
class Wish:
    """A picture to be drawn. negative: what guidance steers away from; "" is nothing."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    sampler: str


def wish_of(body: bytes, default: SampleConfig) -> Wish:
    """The wish that a JSON object says; but for the prompt, what it leaves out is as `default` has it, and seed 0.

    Raises ValueError naming the field at fault and what it may be.

    >>> wish_of(b'{"prompt": "a seven", "steps": 4}', SampleConfig())
    Wish(prompt='a seven', negative='', seed=0, steps=4, guidance=3.0, sampler='heun')
    >>> wish_of(b'{"prompt": "a seven", "steps": 0}', SampleConfig())
    Traceback (most recent call last):
    ValueError: steps is 0; write a whole number from 1 to 1000
    """
    said = object_of(body)
    known = [field.name for field in fields(Wish)]
    if others := [key for key in said if key not in known]:
        raise ValueError(f"{others[0]!r} is no field; those are {', '.join(known)}")
    prompt = text(said, "prompt", "")
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what to draw")
    sampler = text(said, "sampler", default.sampler)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    return Wish(
        prompt.strip(),
        text(said, "negative", "").strip(),
        whole_number(said, "seed", 0, 0, MOST_SEED),
        whole_number(said, "steps", default.steps, 1, MOST_STEPS),
        number(said, "guidance", default.guidance, 0.0, MOST_GUIDANCE),
        sampler,
    )


def object_of(body: bytes) -> Mapping[str, Any]:
    """Raises ValueError for what is no JSON object."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"what was sent is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError('what was sent is no JSON object; send one such as {"prompt": "a seven"}')
    return said


def text(said: Mapping[str, Any], name: str, default: str) -> str:
    """A text of ordinary length."""
    value = said.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shortened(value)}; write a text")
    if len(value) > MOST_LETTERS:
        raise ValueError(f"{name} has {len(value)} letters; write at most {MOST_LETTERS}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say half of a pair
        raise ValueError(f"{name} is no text that can be written as UTF-8: {error.reason}") from error
    return value


def whole_number(said: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A number without a fraction, from `low` to `high`."""
    value = said.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {shortened(value)}; write a whole number from {low} to {high}")
    return value


def number(said: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    value = said.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high:  # NaN is not, either
        raise ValueError(f"{name} is {shortened(value)}; write a number from {low:g} to {high:g}")
    return float(value)


def shortened(value: object) -> str:
    """What was said, for a message."""
    try:
        told = json.dumps(value)
    except ValueError:  # digits beyond what Python prints
        return "a number beyond all bounds"
    return told if len(told) <= 40 else told[:40] + "..."
