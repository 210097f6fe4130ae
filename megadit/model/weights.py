"""How each parameter starts, and which ones decay: two tables by name."""

from __future__ import annotations

import math

from megadit.model.config import ECDiTConfig, TextConfig
from megadit.parallel.init import Constant, Init, Normal, Xavier

CAPTIONS = ("embed.text.tokens", "embed.text.positions")
EMBEDDINGS = (*CAPTIONS, ".labels")  # labels: of each layer, perhaps
BIASES = (".bias", "_bias", ".table")  # an expert's are beside its matrices; a table is added to a shared modulation


def init_of(name: str, config: ECDiTConfig, text: TextConfig) -> Init:
    """The initial distribution of the parameter of this global name.

    adaLN-Zero (DiT): modulation and head start at zero. Projections back into the residual stream are scaled down
    with depth, since without gates nothing else holds the stream's variance (GPT-2's rule, for three adds a layer).
    """
    if name.endswith(BIASES):
        return Constant(0.0)
    if name.endswith("norm.weight"):
        return Constant(1.0)
    if name.endswith("modulation.linear.weight") or name == "head.linear.weight":
        return Constant(0.0)
    if name in CAPTIONS:
        return Normal(text.init_std)
    if name.endswith(EMBEDDINGS) or ".time_" in name or ".pooled_" in name:
        return Normal(0.02)
    if name.startswith("blocks.") and name.endswith((".out.weight", ".down.weight", ".down")):
        return Xavier(gain=1 / math.sqrt(3 * config.layers))
    return Xavier()


def decays(name: str) -> bool:
    """Whether weight decay applies: not to norms, biases and embeddings."""
    return not name.endswith((*BIASES, *EMBEDDINGS, "norm.weight"))
