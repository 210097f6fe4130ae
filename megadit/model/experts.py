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
    """This rank's experts, at full width: down(gelu(x up)), or down(silu(x gate) * (x up)) for SwiGLU."""

    def __init__(self, local_experts: int, config: ECDiTConfig) -> None:
        super().__init__()
        placement = Placement(cuts=(Cut(0, ("ep", "tp")),))
        width, hidden = config.width, config.expert_hidden
        self.up = placed((local_experts, width, hidden), placement)
        self.gate = placed((local_experts, width, hidden), placement) if config.feedforward == "swiglu" else None
        self.down = placed((local_experts, hidden, width), placement)

    def forward(self, x_LMD: Tensor) -> Tensor:
        """As many tokens for each expert: [local expert, token, D] -> the same shape. No host sync."""
        up_LMF = torch.bmm(x_LMD, self.up)
        gate_LMF = None if self.gate is None else torch.bmm(x_LMD, self.gate)
        return torch.bmm(_activate(up_LMF, gate_LMF), self.down)

    def forward_ragged(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by local expert, `counts[i]` of them for expert i: [N, D] -> [N, D].

        An expert without rows still gets a gradient, of zeros.
        """
        # unbind, not indexing: the backward of `up[i]` would fill a whole [L, D, F] of zeros for each expert.
        up, down = self.up.unbind(0), self.down.unbind(0)
        gate = (None,) * len(up) if self.gate is None else self.gate.unbind(0)
        out = []
        for x_MD, up_DF, gate_DF, down_FD in zip(x_ND.split(counts), up, gate, down, strict=True):
            gate_MF = None if gate_DF is None else x_MD @ gate_DF
            out.append(_activate(x_MD @ up_DF, gate_MF) @ down_FD)
        return torch.cat(out)


def _activate(up: Tensor, gate: Tensor | None) -> Tensor:
    return F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up
