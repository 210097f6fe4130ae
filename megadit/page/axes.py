"""What plots are made of: scales, ticks, text, and marks that say what they are when the pointer is over them.

Coordinates are those of a drawing WIDTH wide, which a browser scales to the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megadit.page.markup import Markup, quantity, tag

WIDTH = 960.0
LETTER = 6.4  # width of one, about: text of 12 pixels


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    first: float
    last: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        if self.is_log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.first + part * (self.last - self.first)


def ticks(high: float, count: int = 6) -> list[float]:
    """Round numbers from 0 to at most `high`, about `count` of them.

    >>> ticks(80.0)
    [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    step = _round_up(high / count)
    return [step * i for i in range(math.floor(high / step + 1e-9) + 1)]


def _round_up(value: float) -> float:
    """To 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= value * (1 - 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in a range.

    >>> log_ticks(0.3, 12)
    [0.5, 1.0, 2.0, 5.0, 10.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for digit in (1, 2, 5) if low <= (value := digit * 10.0**power) <= high]


def spread_ticks(scale: Scale, count: int = 6) -> list[float]:
    """About `count` round numbers in a scale's range, wherever it begins.

    >>> spread_ticks(Scale(3.5, 9.2, 0, 1)), spread_ticks(Scale(0.2, 12, 0, 1, is_log=True), 5)
    ([4.0, 5.0, 6.0, 7.0, 8.0, 9.0], [0.2, 0.5, 1.0, 2.0, 5.0, 10.0])
    """
    low, high = scale.low, scale.high
    if scale.is_log:
        found = log_ticks(low, high)
        if len(found) > 2 * count:  # whole powers of ten, as many as there is room for
            powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
            found = [10.0**power for power in powers[:: math.ceil(len(powers) / count)]]
        if len(found) > 2:
            return found
    step = _round_up((high - low) / count)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def drawing(height: float, label: str, *marks: str, width: float = WIDTH, **attributes: object) -> Markup:
    """The whole plot; `label` is what a screen reader says."""
    box = f"0 0 {width:.0f} {height:.0f}"
    return tag("div", tag("svg", *marks, viewBox=box, role="img", aria_label=label, **attributes), class_="plot")


def text(x: float, y: float, content: str, **attributes: object) -> Markup:
    return tag("text", content, x=x, y=y, **attributes)


def titled(name: str, title: str, **attributes: object) -> Markup:
    """A mark that says what it is when the pointer is over it."""
    return tag(name, tag("title", title), **attributes)


def tick_label(value: float, unit: str) -> str:
    """A round number.

    >>> tick_label(2.5e9, "B"), tick_label(20e9, "B")
    ('2.5 GB', '20 GB')
    """
    number, prefixed = quantity(value, unit).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {prefixed}"
