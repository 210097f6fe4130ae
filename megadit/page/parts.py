"""What pages are made of: the page itself, sections, tiles, tables, legends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megadit.page.markup import Markup, join, tag


def page(title: str, style: str, body: Markup, policy: str = "") -> str:
    """A whole HTML document that loads nothing. `policy`: what a browser is to hold it to (Content-Security-Policy)."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        *([tag("meta", http_equiv="Content-Security-Policy", content=policy)] if policy else []),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def tiles(made: Iterable[tuple[str, str, str]]) -> Markup:
    """Figures to be seen at once: (what it is, the figure, a note) of each."""
    return tag(
        "div",
        *(
            tag("div", tag("span", name), tag("b", value), tag("small", note), class_="tile")
            for name, value, note in made
        ),
        class_="tiles",
    )


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, classes: Sequence[str] | None = None
) -> Markup:
    """The first `words` columns are to the left, numbers to the right; a row whose first cell is "total" is a sum.

    `classes`: of the rows, one each.
    """

    def row(cells: Sequence[str], kind: str, name: str = "") -> Markup:
        made = []
        for place, cell in enumerate(cells):
            made.append(tag(kind, cell, **({} if place < words else {"class_": "number"})))
        name = "sum" if cells[0] == "total" else name
        return tag("tr", *made, **({"class_": name} if name else {}))

    rows = list(rows)
    head = tag("thead", row(header, "th"))
    made = (row(cells, "td", name) for cells, name in zip(rows, classes or [""] * len(rows), strict=True))
    return tag("div", tag("table", head, tag("tbody", *made)), class_="scroll")


def section(anchor: str, title: str, *parts: str) -> Markup:
    return tag("section", tag("h2", title), *parts, id=anchor)


def note(text: str) -> Markup:
    return tag("p", text, class_="note")


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """(class of the colour, what it is) of each entry, as HTML."""
    return tag(
        "p", *(join(tag("span", tag("i", class_=f"swatch {name}"), said)) for name, said in entries), class_="legend"
    )
