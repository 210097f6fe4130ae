"""The experts of one rank: feed-forward networks side by side, as batched matrix products.

Shapes: L this rank's experts, M tokens per expert, N rows sorted by expert, D model width, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig
from megadit.parallel.placement import Cut, Placement, placed


class Experts(nn.Module):
    """This rank's experts, at full width: down(gelu(x up)), or down(silu(x gate) * (x up)) for SwiGLU.

    With `model.bias` each product has one: an expert then computes what a dense layer does, before its gate.
    """

    def __init__(self, local_experts: int, config: ECDiTConfig) -> None:
        super().__init__()
        placement = Placement(cuts=(Cut(0, ("ep", "tp")),))
        width, hidden = config.width, config.expert_hidden
        self.up = placed((local_experts, width, hidden), placement)
        self.gate = placed((local_experts, width, hidden), placement) if config.feedforward == "swiglu" else None
        self.down = placed((local_experts, hidden, width), placement)

        def bias(features: int) -> nn.Parameter | None:
            return placed((local_experts, features), placement) if config.bias else None

        self.up_bias, self.down_bias = bias(hidden), bias(width)
        self.gate_bias = None if self.gate is None else bias(hidden)

    def forward(self, x_LMD: Tensor) -> Tensor:
        """As many tokens for each expert: [local expert, token, D] -> the same shape. No host sync."""
        up_LMF = _products(x_LMD, self.up, self.up_bias)
        gate_LMF = None if self.gate is None else _products(x_LMD, self.gate, self.gate_bias)
        return _products(_activate(up_LMF, gate_LMF), self.down, self.down_bias)

    def forward_ragged(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by local expert, `counts[i]` of them for expert i: [N, D] -> [N, D].

        An expert without rows still gets a gradient, of zeros.
        """
        matrices = (self.up, self.gate, self.down, self.up_bias, self.gate_bias, self.down_bias)
        # unbind, not indexing: the backward of `up[i]` would fill a whole [L, D, F] of zeros for each expert.
        of_expert = zip(
            *((None,) * len(counts) if all_L is None else all_L.unbind(0) for all_L in matrices), strict=True
        )
        out = []
        for x_MD, (up, gate, down, *biases) in zip(x_ND.split(counts), of_expert, strict=True):
            up_bias, gate_bias, down_bias = biases
            gate_MF = None if gate is None else _product(x_MD, gate, gate_bias)
            out.append(_product(_activate(_product(x_MD, up, up_bias), gate_MF), down, down_bias))
        return torch.cat(out)


def _products(x_LMD: Tensor, weight_LDF: Tensor, bias_LF: Tensor | None) -> Tensor:
    return torch.bmm(x_LMD, weight_LDF) if bias_LF is None else torch.baddbmm(bias_LF[:, None], x_LMD, weight_LDF)


def _product(x_MD: Tensor, weight_DF: Tensor, bias_F: Tensor | None) -> Tensor:
    return x_MD @ weight_DF if bias_F is None else torch.addmm(bias_F, x_MD, weight_DF)


def _activate(up: Tensor, gate: Tensor | None) -> Tensor:
    return F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up
