"""Expert choice (Zhou et al., arXiv 2202.09368): every expert picks its best tokens, so the load is even by design."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.parallel.placement import Placement, placed


class Router(nn.Module):
    """Affinity of each token to each expert: softmax over experts of x W_r (EC-DiT, arXiv 2410.02098)."""

    def __init__(self, width: int, experts: int, partial: tuple[str, ...]) -> None:
        super().__init__()
        self.weight = placed((experts, width), Placement(partial=partial))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # At least float32: in bf16 many affinities would tie.
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        return F.linear(x_BTD.to(dtype), self.weight.to(dtype)).softmax(dim=-1)


@dataclass(frozen=True)
class Picks:
    """What the experts chose, per image: the picked tokens' indices and their gates, both [B, E, C]."""

    index_BEC: Tensor
    gate_BEC: Tensor


def expert_choice(affinity_BTE: Tensor, capacity: int) -> Picks:
    """Each expert takes the `capacity` tokens of highest affinity in each image; the gate is that affinity.

    The gate is not normalised again. A token that nobody picks keeps its residual alone. Shapes depend on
    `capacity` only, never on the data.
    """
    gate_BEC, index_BEC = affinity_BTE.transpose(1, 2).topk(capacity, dim=2, sorted=False)
    return Picks(index_BEC, gate_BEC)


@dataclass(frozen=True)
class RouterStats:
    """How evenly one layer routed one microbatch; 0-dim tensors on the device, for nobody to wait for.

    unpicked: fraction of tokens that no expert took. busiest: most experts that took one token.
    entropy: mean entropy of a token's affinities, divided by log E (1 is uniform).
    """

    unpicked: Tensor
    busiest: Tensor
    entropy: Tensor


@torch.no_grad()
def router_stats(affinity_BTE: Tensor, picks: Picks) -> RouterStats:
    """Statistics of one routing decision."""
    batch, tokens, experts = affinity_BTE.shape
    takers_BT = affinity_BTE.new_zeros(batch, tokens)
    takers_BT.scatter_add_(1, picks.index_BEC.flatten(1), torch.ones_like(picks.gate_BEC).flatten(1))
    entropy_BT = torch.special.entr(affinity_BTE).sum(dim=-1)
    uniform = torch.log(torch.full_like(entropy_BT[0, 0], experts)).clamp_min(1e-12)  # log 1 = 0 for a lone expert
    return RouterStats((takers_BT == 0).to(takers_BT.dtype).mean(), takers_BT.max(), entropy_BT.mean() / uniform)
