"""The classes of diffusers whose weights can be ours, by the `_class_name` in their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadit.conversion import dit, nucleus, pixart
from megadit.conversion.rule import Architecture, Rule
from megadit.model.config import ECDiTConfig, TextConfig

__all__ = ["ARCHITECTURES", "Architecture", "Rule"]

BY_NORM: dict[str, Architecture] = {"ada_norm_single": pixart.PixArt(), "ada_norm_zero": dit.DiT()}


class Transformer2D:
    """Transformer2DModel, which published config.json files name for what are now two classes; norm_type says which.

    Ours is written as one of the two.
    """

    def sections(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Raises ValueError listing every setting that does not map."""
        norm_type = str(config.get("norm_type"))
        if norm_type not in BY_NORM:
            raise ValueError(
                f"a Transformer2DModel with norm_type={norm_type!r} cannot become ours; only those with "
                f"{' or '.join(map(repr, BY_NORM))} can, PixArt's and DiT's"
            )
        return BY_NORM[norm_type].sections(config)

    def their_config(self, model: ECDiTConfig, text: TextConfig) -> dict[str, Any]:
        """Raises ValueError listing every setting of ours that theirs cannot have."""
        return self._like(model).their_config(model, text)

    def rules(self, model: ECDiTConfig, text: TextConfig) -> list[Rule]:
        return self._like(model).rules(model, text)

    def _like(self, model: ECDiTConfig) -> Architecture:
        return BY_NORM["ada_norm_zero" if model.conditioning == "class" else "ada_norm_single"]


ARCHITECTURES: dict[str, Architecture] = {
    pixart.NAME: pixart.PixArt(),
    dit.NAME: dit.DiT(),
    "Transformer2DModel": Transformer2D(),
    nucleus.NAME: nucleus.Nucleus(),
}
