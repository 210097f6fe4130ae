"""The dense feed-forward layer, hidden width cut over the tensor axis; shared experts are one too."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig
from megadit.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from megadit.parallel.tensor.mappings import Region


class FeedForward(nn.Module):
    """D -> F -> D, token by token: down(gelu(up x)), or down(silu(gate x) * up x) for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ECDiTConfig, region: Region, hidden: int, bias: bool) -> None:
        super().__init__()
        self.region = region
        width, group = config.width, region.group
        self.up = ColumnParallelLinear(width, hidden, group, bias)
        self.gate = ColumnParallelLinear(width, hidden, group, bias) if config.feedforward == "swiglu" else None
        self.down = RowParallelLinear(hidden, width, region, bias)

    def _hidden(self, entered_BTD: Tensor) -> Tensor:
        up_BTF = self.up(entered_BTD)
        if self.gate is None:
            return F.gelu(up_BTF, approximate="tanh")
        return F.silu(self.gate(entered_BTD)) * up_BTF

    def share(self, entered_BTD: Tensor) -> Tensor:
        """This rank's share of the output for tokens that have entered; the caller makes it leave. Without bias."""
        return self.down.share(self._hidden(entered_BTD))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self._hidden(self.region.enter(x_BTD)))
