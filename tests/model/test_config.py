"""Capacities, the layers that have experts, and the sizes of the paper."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from megadit.model.config import PRESETS, ECDiTConfig
from megadit.model.ecdit import ECDiT
from megadit.model.text import TextConfig

# Parameters in units of 1e9, from EC-DiT's table of sizes (arXiv 2410.02098). They include what is frozen: a text
# encoder of 0.67 and an autoencoder; with small embedders that makes 0.83 for every size.
PUBLISHED = {
    "ec-dit-xl": 1.47,
    "ec-dit-xl-32e": 6.08,
    "ec-dit-xxl": 2.35,
    "ec-dit-xxl-32e": 13.47,
    "ec-dit-3xl": 4.50,
    "ec-dit-3xl-32e": 32.15,
    "ec-dit-m": 8.03,
    "ec-dit-m-64e": 97.21,
}
FROZEN = 0.83


@pytest.fixture(scope="module")
def size(region, grid):
    """A function from a configuration to its number of parameters; captions are 1,024 wide and come encoded."""

    def count(config):
        text = TextConfig(vocabulary=1, length=1, width=1024, layers=0)
        with torch.device("meta"):
            model = ECDiT(config, text, range(config.layers), region, grid["ep"])
        return sum(parameter.numel() for parameter in model.parameters())

    return count


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "capacity"),
    [
        (256, 32, 2.0, 16),
        (256, 64, 2.0, 8),
        (10, 4, 1.0, 3),
        (16, 32, 1.0, 1),
        (16, 64, 0.5, 1),
        (16, 2, 8.0, 16),
        (1, 4, 2.0, 1),
    ],
)
def test_capacity_is_the_share_rounded_up_and_at_most_all(tokens, experts, factor, capacity):
    assert ECDiTConfig(experts=experts, capacity_factor=factor).capacity(tokens) == capacity


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 2.0, 3.0])
def test_capacity_is_the_exact_formula(factor):
    for experts in range(1, 40):
        config = ECDiTConfig(experts=experts, capacity_factor=factor)
        for tokens in (1, 7, 64, 100, 256, 1000):
            share = Fraction(factor) * tokens / experts
            assert config.capacity(tokens) == min(tokens, -(-share.numerator // share.denominator))


def test_every_second_layer_has_experts():
    config = ECDiTConfig()
    assert [layer for layer in range(8) if config.is_moe(layer)] == [1, 3, 5, 7]
    assert [layer for layer in range(8) if replace(config, moe_every=3).is_moe(layer)] == [2, 5]
    assert all(replace(config, moe_every=1).is_moe(layer) for layer in range(8))
    assert not any(replace(config, experts=0).is_moe(layer) for layer in range(8))


def test_lengths_follow_from_the_shape():
    config = ECDiTConfig(width=64, ffn_ratio=3, image_size=24, patch=4)
    assert (config.hidden, config.tokens) == (192, 36)


def test_the_defaults_are_xl_with_experts():
    assert ECDiTConfig(**PRESETS["ec-dit-xl-32e"]) == ECDiTConfig()


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("e")])
def test_experts_add_their_weights_and_a_router_to_the_dense_twin(size, name):
    config = ECDiTConfig(**PRESETS[name])
    width, layers = config.width, config.layers // 2
    added = (config.experts - 1) * 8 * width**2 * layers + config.experts * width * layers
    assert size(config) - size(replace(config, experts=0)) == added


@pytest.mark.parametrize(
    ("sparse", "dense"),
    [(name, name[: name.rindex("-")]) for name in PRESETS if name.endswith("e") and name != "ec-dit-m-64e"],
)
def test_sparse_and_dense_presets_are_twins(sparse, dense):
    """But for M, whose dense model has eight layers more."""
    assert PRESETS[sparse] | {"experts": 0} == PRESETS[dense]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(size, name):
    total = size(ECDiTConfig(**PRESETS[name])) / 1e9 + FROZEN
    assert total == pytest.approx(PUBLISHED[name], rel=0.015)
    if name != "ec-dit-m":  # 0.8 % more than published
        assert total == pytest.approx(PUBLISHED[name], abs=0.03)
