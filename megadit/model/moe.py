"""The mixture-of-experts layer, experts whole over ep x tp.

A rank (e, t) of the expert and tensor axes holds the experts [e, t, :] of the logical [ep, tp, local]. After the
gather that any tensor-parallel layer does, it sees all of its images' tokens, so it dispatches only for slice t of
the experts: no communication is added along tp, and the sum at the layer's end adds up the slices. The way of a token:

    x --router--> affinity --enter--> every expert picks its tokens, or every token its experts, in each routing group
    x --enter--> picked tokens, as [destination rank e, its expert, group x C] --all-to-all--> experts --all-to-all-->
    times the gate, added into the token's place --leave--> the layer's output

The router reads the tokens before they enter and its affinities enter instead, so that its gradient is counted once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megadit.model.config import ECDiTConfig
from megadit.model.experts import Experts
from megadit.model.feedforward import FeedForward
from megadit.model.router import (
    GATES,
    Choices,
    Picks,
    Router,
    RouterStats,
    balance_loss,
    expert_choice,
    normalise,
    router_stats,
    seat,
    token_choice,
)
from megadit.parallel.expert.exchange import combine, combine_ragged, dispatch, dispatch_ragged
from megadit.parallel.grid import Group
from megadit.parallel.tensor.linear import divide
from megadit.parallel.tensor.mappings import Region


class Routing(NamedTuple):
    """What a layer's router did. balance: load-balancing loss, summed over the microbatch's images, or None.

    takers_GS: how many experts took each token, int64, without a gradient; a routing group's images lie in a row.
    """

    stats: RouterStats
    balance: Tensor | None
    takers_GS: Tensor


class MoE(nn.Module):
    """out[token] = sum over the experts that took it of gate x expert(token), plus the shared experts."""

    def __init__(self, config: ECDiTConfig, layer: int, region: Region, expert_group: Group) -> None:
        super().__init__()
        self.config, self.region, self.expert_group = config, region, expert_group
        # Not the layer's number, which would have torch.compile compile every layer by itself.
        self.capacity_factor = config.capacity_factor_of(layer)
        self.images, self.has_balance_loss = config.group_images, config.has_balance_loss
        self.local_experts = divide(config.experts, expert_group.size * region.group.size)
        self.reads_time = config.router_input == "timestep"
        self.router = Router(config.width * (1 + self.reads_time), config.experts, region.partial)
        self.experts = Experts(self.local_experts, config)
        self.shared = FeedForward(config, region, config.shared_hidden, bias=False) if config.shared_experts else None

    def forward(self, x_BTD: Tensor, plain_BTD: Tensor, cond_BD: Tensor) -> tuple[Tensor, Routing]:
        """x_BTD: the modulated tokens. plain_BTD: the normalised tokens before modulation. cond_BD has entered."""
        time_BD = self.region.count_once(cond_BD) if self.reads_time else None
        logits_BTE = self.router(x_BTD if time_BD is None else plain_BTD, time_BD)
        affinity_BTE = self.region.enter(GATES[self.config.gate](logits_BTE))
        x_BTD = self.region.enter(x_BTD)
        affinity_GSE = affinity_BTE.unflatten(0, (-1, self.images)).flatten(1, 2)
        x_GSD = x_BTD.unflatten(0, (-1, self.images)).flatten(1, 2)
        balance = None
        if self.config.routing == "expert_choice":
            out_ND, takers_GS, load_E = self._compute(x_GSD, expert_choice(affinity_GSE, self._capacity(affinity_GSE)))
        else:
            choices = token_choice(affinity_GSE, self.config.top_k)
            balance = self._balance(logits_BTE, choices) if self.has_balance_loss else None
            if self.config.dropless:
                out_ND, takers_GS, load_E = self._compute_ragged(x_GSD, choices)
            else:
                picks = seat(choices, self.config.experts, self._capacity(affinity_GSE))
                out_ND, takers_GS, load_E = self._compute(x_GSD, picks)
        out_BTD = out_ND.view_as(x_BTD)
        if self.shared is not None:
            out_BTD = out_BTD + self.shared.share(x_BTD)
        return self.region.leave(out_BTD), Routing(router_stats(logits_BTE, takers_GS, load_E), balance, takers_GS)

    def _capacity(self, affinity_GSE: Tensor) -> int:
        return self.config.slots(self.capacity_factor, affinity_GSE.shape[1])

    def _balance(self, logits_BTE: Tensor, choices: Choices) -> Tensor:
        """Summed over images, of which a group counts all, [1]."""
        # Tokens may lie cut here; only the sum over them is needed, which is E numbers for each image.
        total_BE = self.region.sum_tokens(logits_BTE.softmax(dim=-1).sum(dim=1))
        tokens = choices.expert_GSK.shape[1]
        probability_GE = total_BE.unflatten(0, (-1, self.images)).sum(dim=1) / tokens
        return self.images * balance_loss(probability_GE, choices, self.config.balance_counts).sum().view(1)

    def _mine(self, x_GEC: Tensor) -> Tensor:
        """Slice t of the experts, by destination: [G, E, C] -> [ep, local expert, G * C]."""
        per_rank = (self.expert_group.size, self.region.group.size, self.local_experts)
        x_GPLC = x_GEC.unflatten(1, per_rank).select(2, self.region.group.rank)
        return x_GPLC.permute(1, 2, 0, 3).flatten(2)

    def _compute(self, x_GSD: Tensor, picks: Picks) -> tuple[Tensor, Tensor, Tensor]:
        """(this rank's share of the outputs [N, D], experts per token [G, S], tokens per expert [E])."""
        groups, tokens, _ = x_GSD.shape
        taken_GEC = picks.taken_GEC.to(picks.index_GEC.dtype)
        takers_GS = taken_GEC.new_zeros(groups, tokens)
        takers_GS.scatter_add_(1, picks.index_GEC.flatten(1), taken_GEC.flatten(1))
        if self.config.normalise_gates:
            picks = normalise(picks, tokens)
        group_G11 = torch.arange(groups, device=x_GSD.device).view(-1, 1, 1)
        row_PLN = self._mine(picks.index_GEC + tokens * group_G11)
        gate_PLN = (self._mine(picks.gate_GEC) * self.config.route_scale).to(x_GSD.dtype)
        x_ND = x_GSD.flatten(0, 1)
        picked_PLND = x_ND.index_select(0, row_PLN.flatten()).view(*row_PLN.shape, -1)
        expert_PLND = combine(self.experts(dispatch(picked_PLND, self.expert_group)), self.expert_group)
        weighted_ND = (expert_PLND * gate_PLN.unsqueeze(-1)).flatten(0, 2)
        out_ND = torch.zeros_like(x_ND).index_add_(0, row_PLN.flatten(), weighted_ND)
        return out_ND, takers_GS, taken_GEC.sum(dim=(0, 2))

    def _compute_ragged(self, x_GSD: Tensor, choices: Choices) -> tuple[Tensor, Tensor, Tensor]:
        """The same without a capacity: every wish is granted, and shapes follow the data (host sync)."""
        ranks, slices, local = self.expert_group.size, self.region.group.size, self.local_experts
        expert_N = choices.expert_GSK.flatten()
        load_E = expert_N.new_zeros(self.config.experts).scatter_add_(0, expert_N, torch.ones_like(expert_N))
        gate_GSK = choices.gate_GSK
        if self.config.normalise_gates:
            gate_GSK = gate_GSK / (gate_GSK.sum(dim=2, keepdim=True) + 1e-12)
        # Wishes for slice t, sorted by expert and so by destination; those for other slices sort behind them.
        is_mine_N = expert_N // local % slices == self.region.group.rank
        counts_PL = load_E.view(ranks, slices, local)[:, self.region.group.rank]
        sent_PL, received_PL = torch.stack([counts_PL, self.expert_group.all_to_all(counts_PL)]).tolist()  # host sync
        total = sum(map(sum, sent_PL))
        order_N = torch.where(is_mine_N, expert_N, self.config.experts).argsort(stable=True)[:total]
        row_N = order_N // self.config.top_k
        x_ND = x_GSD.flatten(0, 1)
        arrived_MD = dispatch_ragged(x_ND.index_select(0, row_N), sent_PL, received_PL, self.expert_group)
        counts_L = [sum(source[i] for source in received_PL) for i in range(local)]
        expert_ND = combine_ragged(
            self.experts.forward_ragged(arrived_MD, counts_L), sent_PL, received_PL, self.expert_group
        )
        gate_N = (gate_GSK.flatten().index_select(0, order_N) * self.config.route_scale).to(x_ND.dtype)
        out_ND = torch.zeros_like(x_ND).index_add_(0, row_N, expert_ND * gate_N.unsqueeze(-1))
        return out_ND, torch.full_like(choices.expert_GSK[:, :, 0], self.config.top_k), load_E
