"""The dense feed-forward layer: two matrices and a GELU, hidden width cut over the tensor axis."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig
from megadit.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from megadit.parallel.tensor.mappings import Region


class FeedForward(nn.Module):
    """D -> F -> D, token by token."""

    def __init__(self, config: ECDiTConfig, region: Region) -> None:
        super().__init__()
        self.region = region
        self.up = ColumnParallelLinear(config.width, config.hidden, region.group, config.bias)
        self.down = RowParallelLinear(config.hidden, config.width, region, config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.region.enter(x_BTD)), approximate="tanh"))
