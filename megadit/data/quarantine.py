"""Samples that cannot be used, and why: from a fixed list of reasons, so that they can be counted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Reason = Literal[
    "truncated archive",  # it ends in the middle of a sample, or before its end was marked
    "bad tar member",  # a header that is none
    "unreadable file",  # neither parquet nor a folder that can be read, or a part of one
    "duplicate key",  # a sample of its file came before it under the same key
    "no image",
    "no caption",
    "empty caption",
    "unreadable caption",  # no UTF-8
    "unreadable json",  # no JSON, or not an object of the fields that are known
    "bad weights",
    "no label",
    "not an image",
    "truncated",  # an image that ends too soon
    "damaged",  # an image that cannot be decoded
    "too small",
    "decompression bomb",  # more pixels than an image may have
    "not finite latents",
    "not finite text states",
]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class Bad:
    """A sample that is left out. detail: what a person may want to know on top, or ""."""

    key: str
    reason: Reason
    detail: str = ""


class Unusable(Exception):
    """Raised where a sample turns out to be bad; whoever knows its key makes a `Bad` of it."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        # Addresses in memory, which some libraries name, differ from run to run.
        self.reason, self.detail = reason, re.sub(r" at 0x[0-9a-fA-F]+", "", detail)

    def of(self, key: str) -> Bad:
        """The sample of this key, left out for this reason."""
        return Bad(key, self.reason, self.detail)
