"""HTML and SVG as text, made of elements in which everything is escaped that is not markup itself."""

from __future__ import annotations

from html import escape

# Elements without content: those of HTML that never have any, and the shapes of SVG.
EMPTY = {"meta", "input", "img", "rect", "line", "path", "circle"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element. Children are text, which is escaped, or Markup. `class_` and `stroke_width` are class, stroke-width.

    >>> tag("p", "1 < 2 ", tag("b", "holds"), class_="note")
    '<p class="note">1 &lt; 2 <b>holds</b></p>'
    >>> tag("rect", width=3.14159, stroke_width=2)
    '<rect width="3.14" stroke-width="2"/>'
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"' for key, value in attributes.items()
    )
    content = join(*children)
    if name in EMPTY and not content:
        return Markup(f"<{name}{told}/>")
    return Markup(f"<{name}{told}>{content}</{name}>")


def join(*children: str) -> Markup:
    """Several pieces of text or markup, one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child, quote=False) for child in children))


def _plain(value: object) -> str:
    """Coordinates to hundredths, which no screen shows."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def quantity(value: float, unit: str) -> str:
    """A number with its decimal prefix, to three digits.

    >>> quantity(25.916e9, "B"), quantity(0.0412, "s"), quantity(999.7e6, "B"), quantity(0, "B")
    ('25.9 GB', '41.2 ms', '1.00 GB', '0 B')
    """
    if value == 0:
        return f"0 {unit}"
    prefixes = ["n", "µ", "m", "", "k", "M", "G", "T", "P", "E"]
    place = 3
    while abs(value) >= 999.5 and place < len(prefixes) - 1:
        value, place = value / 1000, place + 1
    while abs(value) < 0.9995 and place > 0:
        value, place = value * 1000, place - 1
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f} {prefixes[place]}{unit}"
