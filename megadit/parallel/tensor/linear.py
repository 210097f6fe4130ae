"""The linear layers of tensor parallelism: cut by columns, by rows, or whole. The region around them communicates."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megadit.parallel.grid import Group
from megadit.parallel.placement import Cut, Placement, placed
from megadit.parallel.tensor.mappings import Region


def divide(total: int, parts: int) -> int:
    """total / parts, which must be whole: the configuration's rules have seen to it."""
    assert total % parts == 0, f"{total} is not a multiple of {parts}"
    return total // parts


class ColumnParallelLinear(nn.Module):
    """x [..., in], whole on every rank -> this rank's part [..., out / size]. The input has entered the region."""

    def __init__(self, in_width: int, out_width: int, group: Group, bias: bool) -> None:
        super().__init__()
        local = divide(out_width, group.size)
        self.weight = placed((local, in_width), Placement(cuts=(Cut(0, ("tp",)),)))
        self.bias = placed((local,), Placement(cuts=(Cut(0, ("tp",)),))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's part [B, T, in / size] -> the sum over ranks [B, T, out], which has left the region."""

    def __init__(self, in_width: int, out_width: int, region: Region, bias: bool) -> None:
        super().__init__()
        self.region = region
        local = divide(in_width, region.group.size)
        self.weight = placed((out_width, local), Placement(cuts=(Cut(1, ("tp",)),)))
        # Added once, after the sum.
        self.bias = placed((out_width,), Placement(partial=region.partial)) if bias else None

    def share(self, x: Tensor) -> Tensor:
        """This rank's share of the sum, before it leaves the region, and without the bias."""
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.region.leave(self.share(x))
        return y if self.bias is None else y + self.bias


class ReplicatedLinear(nn.Module):
    """x [..., in] -> [..., out], the weight whole on every rank.

    `partial` names the axes along which ranks see different inputs of one sample, so that their gradients are summed.
    """

    def __init__(self, in_width: int, out_width: int, bias: bool = True, partial: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight = placed((out_width, in_width), Placement(partial=partial))
        self.bias = placed((out_width,), Placement(partial=partial)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
