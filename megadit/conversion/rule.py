"""How weights of another library lie against ours: rules that move elements and never compute with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megadit.model.config import ECDiTConfig, TextConfig


class Rule(NamedTuple):
    """A few of our tensors against a few of theirs. Both functions are exact inverses, bit for bit: they move elements
    only, whatever the dtype.

    Where several of theirs are copies of one of ours, `to_ours` raises ValueError for copies that differ.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Sequence[Tensor]], list[Tensor]]
    to_theirs: Callable[[Sequence[Tensor]], list[Tensor]]


class Architecture(Protocol):
    """One class of another library whose networks ours can be."""

    def sections(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Their config.json -> our sections, {"model": {...}, "text": {...}}.

        Raises ValueError listing every setting that does not map.
        """

    def their_config(self, model: ECDiTConfig, text: TextConfig) -> dict[str, Any]:
        """The inverse. Raises ValueError listing every setting of ours that theirs cannot have."""

    def rules(self, model: ECDiTConfig, text: TextConfig) -> list[Rule]:
        """Every one of our tensors and every one of theirs, each in one rule."""
