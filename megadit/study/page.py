"""Fills the marked parts of a Markdown page from records, so that no figure in it is written by hand.

A part is what stands between two comments; the first says from which records, by a path from the page, and what:

    <!-- study results/reproduction/cpu: scores -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megadit.runtime.disk import replace_file
from megadit.study.figures import draw_curves, draw_measures
from megadit.study.summary import Variant, read_records
from megadit.study.tables import TABLES

PART = re.compile(
    r"(<!-- study (?P<records>\S+): (?P<what>\w+)(?: (?P<file>\S+))? -->\n)(?P<body>.*?)(<!-- end -->)", re.S
)
FIGURES: dict[str, Callable[[list[Variant], Path], str]] = {"curves": draw_curves, "measures": draw_measures}


def fill(page: Path, write: bool = True) -> list[str]:
    """The marked parts that have changed. Writes the page and its figures, unless `write` is False.

    Raises ValueError naming what cannot be read, or a part that is of no kind.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise ValueError(f"{page}: {error.strerror}") from error
    changed = []

    def filled(part: re.Match[str]) -> str:
        what, file, variants = part["what"], part["file"], read_records(page.parent / part["records"])
        if file and what in FIGURES:
            alternative = FIGURES[what](variants, page.parent / file) if write else _alternative(part["body"])
            body = f"![{alternative}]({file})\n"
        elif what in TABLES:
            body = TABLES[what](variants)
        else:
            known = ", ".join([*TABLES, *(f"{figure} FILE" for figure in FIGURES)])
            raise ValueError(f"{page}: {part[1].strip()} is of no kind; there are {known}")
        if body != part["body"]:
            changed.append(part[1].strip())
        return part[1] + body + part[6]

    new = PART.sub(filled, text)
    if write:
        replace_file(page, new.encode())
    return changed


def _alternative(body: str) -> str:
    found = re.match(r"!\[(.*)\]", body)
    return found[1] if found else ""
