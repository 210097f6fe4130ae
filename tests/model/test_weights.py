"""How every parameter of a model starts, and which of them decay."""

import math
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch

from megadit.model.ecdit import ECDiT
from megadit.model.text import TextConfig
from megadit.model.weights import decays, init_of
from megadit.parallel.init import initialise

ZERO = ["*.bias", "*_bias", "*.modulation.table", "*modulation.linear.weight", "head.linear.weight"]
ONE = ["*.q_norm.weight", "*.k_norm.weight", "*.attention_norm.weight", "*.feedforward_norm.weight", "*.norm.weight"]
CAPTIONS = ["embed.text.tokens", "embed.text.positions"]
SMALL = ["*.time_in.weight", "*.time_out.weight", "*.labels"]
SMALL += ["embed.pooled_in.weight", "embed.pooled_out.weight"]
INTO_THE_STREAM = ["blocks.*.out.weight", "blocks.*.down.weight", "blocks.*.experts.down"]
NO_DECAY = ["*.bias", "*_bias", "*.table", *ONE, *CAPTIONS, "*.labels"]
# Changes of the configuration, and how many parameters start at random: the two ends, a block's attention, and
# feed-forward layers, of which a mixture has a router and perhaps shared ones.
TEXT_END, TIME_END, ATTENTION = 2 + 4 * 2, 1 + 2, 4
FROZEN = {"text": TextConfig(kind="t5+clip", channels=40, width=16, pooled=24)}
WIDE = {"text": TextConfig(vocabulary=16, length=8, width=16, init_std=0.5)}
MODELS = {
    "pooled": (FROZEN, 2 + 2 + TIME_END + 4 * (2 * ATTENTION + 2) + 2),
    "text": ({}, TEXT_END + TIME_END + 4 * (2 * ATTENTION + 2) + 2),
    "wide_embeddings": (WIDE, TEXT_END + TIME_END + 4 * (2 * ATTENTION + 2) + 2),
    "classes": ({"conditioning": "class", "classes": 40}, 1 + TIME_END + 4 * (ATTENTION + 2) + 2),
    "nucleus": (
        {"feedforward": "swiglu", "shared_experts": 2, "router_input": "timestep", "expert_ratio": 2.0},
        TEXT_END + TIME_END + 4 * (2 * ATTENTION + 3) + 2 * (1 + 3),
    ),
    "adaln_single": ({"modulation": "shared"}, TEXT_END + TIME_END + 4 * (2 * ATTENTION + 2) + 2),
    "per_layer": (
        {"conditioning": "class", "classes": 40, "embedders": "per_layer"},
        4 * (1 + 2) + 1 + 4 * (ATTENTION + 2) + 2,
    ),
}


def matches(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def fresh(kind, config, text, region, grid):
    """A model with biases everywhere, as training starts it."""
    changes = dict(MODELS[kind][0])
    text = changes.pop("text", text)
    config = replace(config, bias=True, **changes)
    model = ECDiT(config, text, range(config.layers), region, grid["ep"]).to(torch.float64)
    initialise(model.named_parameters(), grid, 0, lambda name: init_of(name, config, text))
    return model


def test_every_parameter_starts_as_its_kind_does(fresh, kind):
    random = 0
    for name, value in fresh.named_parameters():
        if matches(name, ZERO):
            assert torch.all(value == 0), name
        elif matches(name, ONE):
            assert torch.all(value == 1), name
        else:
            random += 1
            std = 0.02 if matches(name, [*SMALL, *CAPTIONS]) else math.sqrt(2 / (value.shape[-1] + value.shape[-2]))
            if matches(name, CAPTIONS) and kind == "wide_embeddings":
                std = 0.5
            if matches(name, INTO_THE_STREAM):
                std /= math.sqrt(3 * 4)  # three adds in each of the four layers
            error = 5 / math.sqrt(value.numel())  # five deviations of the mean; more of the deviation
            assert value.std().item() == pytest.approx(std, rel=error), name
            assert abs(value.mean().item()) < error * std, name
    assert random == MODELS[kind][1]


def test_projections_are_uniform_within_glorots_bound(fresh):
    weight = fresh.blocks["1"].feedforward.experts.up
    bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
    assert weight.shape[1] == 32
    assert 0.99 * bound < weight.abs().max().item() <= bound


def test_a_fresh_model_predicts_no_velocity(fresh, randn):
    image, ids = randn(2, 3, 8, 8), torch.tensor([[2, 3], [2, 3]])
    times = torch.tensor([0.2, 0.7], dtype=torch.float64)
    inputs = {"text_ids_BL": ids, "text_mask_BL": ids > 0, "labels_B": torch.tensor([0, 40])}
    inputs |= {"text_states_BLC": randn(2, 2, 40), "text_pooled_BP": randn(2, 24)}
    velocity = fresh(image, timesteps_B=times, size=(8, 8), **inputs)
    assert torch.all(velocity == 0)


def test_norms_biases_and_embeddings_do_not_decay(fresh):
    names = [name for name, _ in fresh.named_parameters()]
    assert [name for name in names if not decays(name)] == [name for name in names if matches(name, NO_DECAY)]
    kept = {"embed.patch.weight", "head.linear.weight", "blocks.0.attention.q.weight"}
    kept |= {"blocks.1.feedforward.router.weight", "blocks.1.feedforward.experts.up"}
    kept |= {name for name in names if name.endswith("modulation.linear.weight")}
    kept |= {name for name in names if ".shared." in name and not name.endswith(".bias")}
    assert kept <= {name for name in names if decays(name)}
