"""Routing and mixtures of experts as loops over tokens, written to be read."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F

EPSILON = 1e-12  # what is added to a token's sum of gates before they are divided by it


def best_tokens(scores, capacity):
    """Expert choice of one expert, from its score for each token of a group: the places of the highest."""
    return sorted(range(len(scores)), key=lambda token: scores[token], reverse=True)[:capacity]


def best_experts(scores, top_k):
    """Token choice of one token, from its score for each expert, the best first."""
    return sorted(range(len(scores)), key=lambda expert: scores[expert], reverse=True)[:top_k]


def seats(choices, experts, capacity):
    """For each expert the (token, choice) pairs that it has room for; `choices[token]` are experts, best first.

    Every token asks for its first choice before any asks for its second one; a token later in the group comes later.
    """
    seated = [[] for _ in range(experts)]
    for choice in range(len(choices[0])):
        for token, asked in enumerate(choices):
            if len(seated[asked[choice]]) < capacity:
                seated[asked[choice]].append((token, choice))
    return seated


def balance(probabilities, choices, counts):
    """E x the sum over experts of (share of what was asked for) x (mean probability), of one group [S, E]."""
    experts = probabilities.shape[1]
    asked = [expert for of_token in choices for expert in (of_token if counts == "picks" else of_token[:1])]
    return experts * sum(
        asked.count(expert) / len(asked) * probabilities[:, expert].mean() for expert in range(experts)
    )


def capacity(config, layer, tokens):
    """Slots of an expert, in exact arithmetic."""
    factor = Fraction(config.capacity_overrides.get(layer, config.capacity_factor))
    asked = tokens * (config.top_k if config.routing == "token_choice" else 1)
    return min(tokens, math.ceil(factor * asked / config.experts))


def logits(moe, x, plain, cond):
    """[T, E] of one image. The timestep embedding goes in front of the unmodulated token."""
    if moe.config.router_input == "timestep":
        x = torch.stack([torch.cat([cond, token]) for token in plain])
    return x @ moe.router.weight.T


def gate_of(config, logits):
    if config.gate == "identity":
        return logits
    return logits.exp() / logits.exp().sum(-1, keepdim=True) if config.gate == "softmax" else 1 / (1 + (-logits).exp())


def feedforward(x, up, gate, down):
    """down(gelu(x up)), or down(silu(x gate) * (x up)), of one token; the weights are [in, out]."""
    hidden = F.gelu(x @ up, approximate="tanh") if gate is None else F.silu(x @ gate) * (x @ up)
    return hidden @ down


def takers(config, layer, scores):
    """For each token of a group, the experts that compute it, from its scores [S, E]."""
    scores = scores.tolist()
    if config.routing == "expert_choice":
        count = capacity(config, layer, len(scores))
        chosen = [best_tokens(column, count) for column in zip(*scores, strict=True)]
    else:
        choices = [best_experts(row, config.top_k) for row in scores]
        room = len(scores) if config.dropless else capacity(config, layer, len(scores))
        chosen = [[token for token, _ in seated] for seated in seats(choices, config.experts, room)]
    return [[expert for expert, tokens in enumerate(chosen) if token in tokens] for token in range(len(scores))]


def mixture(moe, layer, x_BTD, plain_BTD, cond_BD):
    """(output [B, T, D], experts of each token by group, balance loss summed over images) of a layer on one rank."""
    config, experts = moe.config, moe.experts
    logits_B = [logits(moe, *image) for image in zip(x_BTD, plain_BTD, cond_BD, strict=True)]
    outputs, taken, loss = [], [], 0.0
    for begin in range(0, len(x_BTD), moe.images):
        group = range(begin, begin + moe.images)
        logit_SE, x_SD = torch.cat([logits_B[i] for i in group]), torch.cat([x_BTD[i] for i in group])
        affinity_SE = gate_of(config, logit_SE)
        taken.append(takers(config, layer, affinity_SE))
        for token, x in enumerate(x_SD):
            out, mine = torch.zeros_like(x), taken[-1][token]
            total = sum(affinity_SE[token, expert] for expert in mine) + EPSILON if config.normalise_gates else 1.0
            for expert in mine:
                weights = (
                    experts.up[expert],
                    None if experts.gate is None else experts.gate[expert],
                    experts.down[expert],
                )
                out = out + config.route_scale * affinity_SE[token, expert] / total * feedforward(x, *weights)
            if moe.shared is not None:
                gate = None if moe.shared.gate is None else moe.shared.gate.weight.T
                out = out + feedforward(x, moe.shared.up.weight.T, gate, moe.shared.down.weight.T)
            outputs.append(out)
        choices = [best_experts(row, config.top_k) for row in affinity_SE.tolist()]
        loss = loss + moe.images * balance(logit_SE.softmax(-1), choices, config.balance_counts)
    return torch.stack(outputs).view_as(x_BTD), taken, loss
