"""Fills the marked parts of a Markdown page from records, so that no figure in it is written by hand.

A part is what stands between two comments; the first says from which records, by a path from the page, and what:

    <!-- study results/reproduction/cpu: scores -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import re
from pathlib import Path

from megadit.runtime.disk import replace_file
from megadit.study.figures import FIGURES
from megadit.study.summary import read_records
from megadit.study.tables import TABLES

PART = re.compile(
    r"(<!-- study (?P<records>\S+): (?P<what>\w+)(?: (?P<file>\S+))? -->\n)"
    r"(?P<body>(?:(?!<!-- study ).)*?)(<!-- end -->)",
    re.S,
)


def fill(page: Path, write: bool = True) -> list[str]:
    """The marked parts that have changed. Writes the page and its figures, unless `write` is False: then only whether
    figures are there is looked at.

    Raises ValueError naming what cannot be read, a part that does not end, or one that is of no kind.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise ValueError(f"{page}: {error.strerror}") from error
    whole = {part.start() for part in PART.finditer(text)}
    for begin in re.finditer("<!-- study .*", text):
        if begin.start() not in whole:
            raise ValueError(
                f"{page}: {begin[0]} is no part: it has no end before the next, or is not <!-- study PATH: WHAT -->"
            )
    changed = []

    def filled(part: re.Match[str]) -> str:
        what, file, variants = part["what"], part["file"], read_records(page.parent / part["records"])
        if file and what in FIGURES:
            if write:
                FIGURES[what].draw(variants, page.parent / file)
            elif not (page.parent / file).exists():
                changed.append(part[1].strip())
            body = f"![{FIGURES[what].caption}]({file})\n"
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
