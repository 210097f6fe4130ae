"""The expert-choice mixture-of-experts layer, experts whole over ep x tp.

A rank (e, t) of the expert and tensor axes holds the experts [e, t, :] of the logical [ep, tp, local]. After the
gather that any tensor-parallel layer does, it sees all of its images' tokens, so it dispatches only for slice t of
the experts: no communication is added along tp, and the sum at the layer's end adds up the slices. The way of a token:

    x --router--> affinity --enter--> every expert picks its C best tokens of each image
    x --enter--> picked tokens, as [destination rank e, its expert, image x C] --all-to-all--> experts --all-to-all-->
    times the gate, added into the token's place --leave--> the layer's output

The router reads the tokens before they enter and its affinities enter instead, so that its gradient is counted once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig
from megadit.model.router import Router, RouterStats, expert_choice, router_stats
from megadit.parallel.expert.exchange import combine, dispatch
from megadit.parallel.grid import Group
from megadit.parallel.placement import Cut, Placement, placed
from megadit.parallel.tensor.linear import divide
from megadit.parallel.tensor.mappings import Region


class Experts(nn.Module):
    """This rank's experts: two batched matrix products with a GELU between them, at full width."""

    def __init__(self, local_experts: int, config: ECDiTConfig) -> None:
        super().__init__()
        placement = Placement(cuts=(Cut(0, ("ep", "tp")),))
        self.up = placed((local_experts, config.width, config.hidden), placement)
        self.down = placed((local_experts, config.hidden, config.width), placement)

    def forward(self, x_LMD: Tensor) -> Tensor:
        return torch.bmm(F.gelu(torch.bmm(x_LMD, self.up), approximate="tanh"), self.down)


class ExpertChoiceMoE(nn.Module):
    """out[token] = sum over the experts that picked it of gate x expert(token), routed image by image."""

    stats: RouterStats | None = None  # of the latest forward; read by whoever reports, detached from the graph

    def __init__(self, config: ECDiTConfig, region: Region, expert_group: Group) -> None:
        super().__init__()
        self.config, self.region, self.expert_group = config, region, expert_group
        self.local_experts = divide(config.experts, expert_group.size * region.group.size)
        self.router = Router(config.width, config.experts, region.partial)
        self.experts = Experts(self.local_experts, config)

    def _mine(self, x_BEC: Tensor) -> Tensor:
        """Slice t of the experts, by destination: [B, E, C] -> [ep, local expert, B * C]."""
        per_rank = (self.expert_group.size, self.region.group.size, self.local_experts)
        x_BPLC = x_BEC.unflatten(1, per_rank).select(2, self.region.group.rank)
        return x_BPLC.permute(1, 2, 0, 3).flatten(2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        affinity_BTE = self.region.enter(self.router(x_BTD))
        x_BTD = self.region.enter(x_BTD)
        batch, tokens, _ = x_BTD.shape
        picks = expert_choice(affinity_BTE, self.config.capacity(tokens))
        self.stats = router_stats(affinity_BTE, picks)

        image_B11 = torch.arange(batch, device=x_BTD.device).view(-1, 1, 1)
        row_PLN = self._mine(picks.index_BEC + tokens * image_B11)
        gate_PLN = self._mine(picks.gate_BEC).to(x_BTD.dtype)
        x_ND = x_BTD.flatten(0, 1)
        picked_PLND = x_ND.index_select(0, row_PLN.flatten()).view(*row_PLN.shape, -1)
        expert_PLND = combine(self.experts(dispatch(picked_PLND, self.expert_group)), self.expert_group)
        weighted_ND = (expert_PLND * gate_PLN.unsqueeze(-1)).flatten(0, 2)
        out_ND = torch.zeros_like(x_ND).index_add_(0, row_PLN.flatten(), weighted_ND)
        return self.region.leave(out_ND.view_as(x_BTD))
