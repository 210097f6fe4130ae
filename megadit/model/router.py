"""Who computes what: routers, and the two ways to choose, as pure functions of affinities.

Expert choice (Zhou et al., arXiv 2202.09368): every expert picks its best tokens, so the load is even by design.
Token choice (GShard, arXiv 2006.16668): every token asks for its best experts, which have room for so many.

Both give `Picks` of one fixed shape, so that all that follows is one path. Shapes: G routing groups, S tokens of a
group, E experts, C capacity, K choices of a token, X width of what a router reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.parallel.placement import Placement, placed

# From logits to affinities, which are what is compared and what the gates are.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda logits: logits,
}


class Router(nn.Module):
    """Logit of each token for each expert: x W_r (EC-DiT, arXiv 2410.02098)."""

    def __init__(self, in_width: int, experts: int, partial: tuple[str, ...]) -> None:
        super().__init__()
        self.weight = placed((experts, in_width), Placement(partial=partial))

    def forward(self, x_BTX: Tensor, cond_BX: Tensor | None = None) -> Tensor:
        """[B, T, E], at least float32: in bf16 many affinities would tie.

        `cond_BX` is joined to every token, in front of it: the sum of two products, without copying it T times.
        """
        dtype = torch.promote_types(x_BTX.dtype, torch.float32)
        weight = self.weight.to(dtype)
        if cond_BX is None:
            return F.linear(x_BTX.to(dtype), weight)
        for_cond, for_token = weight.split([cond_BX.shape[-1], x_BTX.shape[-1]], dim=1)
        return F.linear(x_BTX.to(dtype), for_token) + F.linear(cond_BX.to(dtype), for_cond)[:, None]


class Picks(NamedTuple):
    """The tokens that each expert computes, per routing group, all [G, E, C].

    index: places in the group. gate: weights of the experts' outputs. taken: False where a slot stayed empty; its
    index is 0 and its gate 0 then.
    """

    index_GEC: Tensor
    gate_GEC: Tensor
    taken_GEC: Tensor


def expert_choice(affinity_GSE: Tensor, capacity: int) -> Picks:
    """Each expert takes the `capacity` tokens of highest affinity in each group; the gate is that affinity.

    A token that nobody picks keeps its residual alone. Shapes depend on `capacity` only, never on the data.
    """
    gate_GEC, index_GEC = affinity_GSE.transpose(1, 2).topk(capacity, dim=2, sorted=False)
    return Picks(index_GEC, gate_GEC, torch.ones_like(index_GEC, dtype=torch.bool))


class Choices(NamedTuple):
    """The experts that each token asks for, the best first, both [G, S, K]."""

    expert_GSK: Tensor
    gate_GSK: Tensor


def token_choice(affinity_GSE: Tensor, top_k: int) -> Choices:
    """Each token asks for the `top_k` experts of its highest affinities; the gates are those."""
    gate_GSK, expert_GSK = affinity_GSE.topk(top_k, dim=2)
    return Choices(expert_GSK, gate_GSK)


def seat(choices: Choices, experts: int, capacity: int) -> Picks:
    """Give each expert the first `capacity` of the tokens that ask for it; the others are dropped.

    First choices come before second ones, and tokens in their order (GShard, algorithm 1). Shapes are fixed.

    1. Line up the wishes of a group: all first choices, then all second ones.
    2. Sort them by expert, stably, so that each expert's queue keeps that order.
    3. A wish's place in the queue is its place in the sorted line less where its expert's queue begins.
    4. Write token and gate into slot (expert, place); wishes without room go to a slot that is thrown away.
    """
    expert_GSK, gate_GSK = choices
    groups, tokens, top_k = expert_GSK.shape
    expert_GN = expert_GSK.transpose(1, 2).flatten(1)
    sorted_GN, order_GN = expert_GN.sort(dim=1, stable=True)
    queue_GE = expert_GN.new_zeros(groups, experts).scatter_add_(1, expert_GN, torch.ones_like(expert_GN))
    begin_GE = queue_GE.cumsum(dim=1) - queue_GE
    place_GN = torch.arange(tokens * top_k, device=expert_GN.device) - begin_GE.gather(1, sorted_GN)
    slots = experts * capacity
    slot_GN = torch.where(place_GN < capacity, sorted_GN * capacity + place_GN, slots)

    def fill(empty: Tensor, values_GN: Tensor) -> Tensor:
        return empty.scatter(1, slot_GN, values_GN)[:, :-1].unflatten(1, (experts, capacity))

    index_GEC = fill(order_GN.new_zeros(groups, slots + 1), order_GN % tokens)
    sorted_gate_GN = gate_GSK.transpose(1, 2).flatten(1).gather(1, order_GN)
    gate_GEC = fill(sorted_gate_GN.new_zeros(groups, slots + 1), sorted_gate_GN)
    no = torch.zeros(groups, slots + 1, dtype=torch.bool, device=slot_GN.device)
    return Picks(index_GEC, gate_GEC, fill(no, torch.ones_like(slot_GN, dtype=torch.bool)))


def normalise(picks: Picks, tokens: int) -> Picks:
    """Gates of a token, over the experts that took it, sum to 1 (Nucleus-Image, arXiv 2604.12163)."""
    index_GN, gate_GN = picks.index_GEC.flatten(1), picks.gate_GEC.flatten(1)
    total_GS = gate_GN.new_zeros(len(gate_GN), tokens).scatter_add(1, index_GN, gate_GN)
    normal_GN = gate_GN / (total_GS.gather(1, index_GN) + 1e-12)
    return picks._replace(gate_GEC=normal_GN.view_as(picks.gate_GEC))


def balance_loss(probability_GE: Tensor, choices: Choices, counts: str) -> Tensor:
    """E sum_e f_e P_e of each group, [G]: 1 when the load is even (Switch, arXiv 2101.03961, equation 4).

    P_e is the mean probability of expert e, `probability_GE`, which carries the gradient; f_e its share of what the
    tokens asked for: of all their picks, or with `counts="first"` of the first choices alone, as GShard has it.
    """
    expert_GN = (choices.expert_GSK if counts == "picks" else choices.expert_GSK[:, :, :1]).flatten(1)
    asked_GE = torch.zeros_like(probability_GE).scatter_add_(
        1, expert_GN, torch.ones_like(expert_GN, dtype=probability_GE.dtype)
    )
    experts = probability_GE.shape[1]
    return experts / expert_GN.shape[1] * (asked_GE * probability_GE).sum(dim=1)


class RouterStats(NamedTuple):
    """How one layer routed one microbatch; tensors on the device, detached, for nobody to wait for.

    picks: mean number of experts that took a token. unpicked: fraction of tokens that no expert took.
    busiest: most experts that took one token, mean over the groups. entropy: mean entropy of a token's probabilities,
    divided by log E (1 is uniform). load_E: tokens that each expert took, divided by the mean over experts.
    """

    picks: Tensor
    unpicked: Tensor
    busiest: Tensor
    entropy: Tensor
    load_E: Tensor


@torch.no_grad()
def router_stats(logits_BTE: Tensor, takers_GS: Tensor, load_E: Tensor) -> RouterStats:
    """`takers_GS`: how many experts took each token; `load_E`: how many tokens each expert took."""
    takers_GS, load_E = takers_GS.to(logits_BTE), load_E.to(logits_BTE)
    entropy = torch.special.entr(logits_BTE.softmax(dim=-1)).sum(dim=-1).mean()
    uniform = torch.log(torch.full_like(entropy, logits_BTE.shape[-1])).clamp_min(1e-12)  # log 1 = 0 for a lone expert
    return RouterStats(
        picks=takers_GS.mean(),
        unpicked=(takers_GS == 0).to(takers_GS.dtype).mean(),
        busiest=takers_GS.amax(dim=1).mean(),
        entropy=entropy / uniform,
        load_E=load_E / load_E.mean().clamp_min(1e-12),
    )
