"""How every parameter of a model starts, and which of them decay."""

import math
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch

from megadit.model.ecdit import ECDiT
from megadit.model.weights import decays, init_of
from megadit.parallel.init import initialise

ZERO = ["*.bias", "*modulation.linear.weight", "head.linear.weight"]
ONE = ["*.q_norm.weight", "*.k_norm.weight", "*.attention_norm.weight", "*.feedforward_norm.weight", "*.norm.weight"]
SMALL = ["embed.text.tokens", "embed.text.positions", "embed.time_in.weight", "embed.time_out.weight"]
INTO_THE_STREAM = ["blocks.*.out.weight", "blocks.*.down.weight", "blocks.*.experts.down"]
NO_DECAY = ["*.bias", *ONE, "embed.text.tokens", "embed.text.positions"]


def matches(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture(scope="module")
def fresh(config, text, region, grid):
    """A model with biases everywhere, as training starts it."""
    config = replace(config, bias=True)
    model = ECDiT(config, text, range(config.layers), region, grid["ep"]).to(torch.float64)
    initialise(model.named_parameters(), grid, 0, lambda name: init_of(name, config))
    return model


def test_every_parameter_starts_as_its_kind_does(fresh):
    random = 0
    for name, value in fresh.named_parameters():
        if matches(name, ZERO):
            assert torch.all(value == 0), name
        elif matches(name, ONE):
            assert torch.all(value == 1), name
        else:
            random += 1
            std = 0.02 if matches(name, SMALL) else math.sqrt(2 / (value.shape[-1] + value.shape[-2]))
            if matches(name, INTO_THE_STREAM):
                std /= math.sqrt(3 * 4)  # three adds in each of the four layers
            error = 5 / math.sqrt(value.numel())  # five deviations of the mean; more of the deviation
            assert value.std().item() == pytest.approx(std, rel=error), name
            assert abs(value.mean().item()) < error * std, name
    # In each block seven attention matrices and an out, twice; two of the feed-forward; a router every second block.
    assert random == len(SMALL) + 1 + 2 * 4 + 4 * (4 + 4 + 2) + 2


def test_projections_are_uniform_within_glorots_bound(fresh):
    weight = fresh.blocks["1"].feedforward.experts.up
    bound = math.sqrt(6 / (32 + 128))
    assert 0.99 * bound < weight.abs().max().item() <= bound


def test_a_fresh_model_predicts_no_velocity(fresh, randn):
    image, ids = randn(2, 3, 8, 8), torch.tensor([[2, 3], [2, 3]])
    times = torch.tensor([0.2, 0.7], dtype=torch.float64)
    velocity = fresh(image, timesteps_B=times, text_ids_BL=ids, text_mask_BL=ids > 0, size=(8, 8))
    assert torch.all(velocity == 0)


def test_norms_biases_and_embeddings_do_not_decay(fresh):
    names = [name for name, _ in fresh.named_parameters()]
    assert [name for name in names if not decays(name)] == [name for name in names if matches(name, NO_DECAY)]
    kept = {"embed.patch.weight", "head.linear.weight", "blocks.0.modulation.linear.weight"}
    kept |= {"blocks.1.feedforward.router.weight", "blocks.1.feedforward.experts.up", "embed.text.layers.0.qkv.weight"}
    assert kept <= {name for name in names if decays(name)}
