"""Prompts before they are drawn: those of a file, a line each, and whether they say anything."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger("megadit")

STDIN = "-"


def read_prompts(source: str) -> list[str]:
    """The lines of a UTF-8 file ("-": of standard input) without the white space around them; empty ones are skipped,
    and the log says how many.

    Raises ValueError naming the file, and the line that is at fault, for one that cannot be read or has no prompt.
    """
    name = "standard input" if source == STDIN else source
    try:
        content = sys.stdin.buffer.read() if source == STDIN else Path(source).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"prompts {name}: {error.strerror}") from error
    prompts, skipped = [], 0
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):  # at line ends alone: bytes
        try:
            prompt = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts {name}: line {number} is not UTF-8 text; save the file as UTF-8") from error
        if prompt:
            prompts.append(prompt)
        else:
            skipped += 1
    if not prompts:
        raise ValueError(f"prompts {name}: it holds no prompt; write one a line")
    if skipped:
        logger.info("%s: %d of %d lines are empty, and skipped", name, skipped, skipped + len(prompts))
    return prompts


def check_prompts(prompts: Sequence[str], first_index: int = 0) -> None:
    """Raises ValueError for no prompts, and for an empty one: guidance steers away from the empty caption.

    first_index: by which the first of them is named.

    >>> check_prompts(["a seven", " "])
    Traceback (most recent call last):
    ValueError: prompt 1 is empty; say what to draw
    """
    if not prompts:
        raise ValueError("no prompts; say what to draw")
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {first_index + i} is empty; say what to draw")
