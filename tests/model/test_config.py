"""Capacities, the layers that have experts, the sizes of the paper, and the ways to route of its neighbours."""

from dataclasses import fields, replace
from fractions import Fraction

import pytest
import torch

from megadit.model.config import PRESETS, ROUTING_PRESETS, ECDiTConfig
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
    assert ECDiTConfig(experts=experts, capacity_factor=factor).capacity(1, tokens) == capacity


def rounded_up(share, tokens):
    return min(tokens, -(-share.numerator // share.denominator))


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 2.0, 3.0])
def test_capacity_is_the_exact_formula(factor):
    for experts in range(1, 40):
        config = ECDiTConfig(experts=experts, capacity_factor=factor)
        asking = replace(config, routing="token_choice", top_k=3)
        for tokens in (1, 7, 64, 100, 256, 1000):
            share = Fraction(factor) * tokens / experts
            assert config.capacity(1, tokens) == rounded_up(share, tokens)
            assert asking.capacity(1, tokens) == rounded_up(3 * share, tokens)


@pytest.mark.parametrize(("tokens", "factor", "experts", "capacity"), [(100, 1.1, 10, 11), (440, 1.1, 4, 121)])
def test_capacity_is_not_raised_by_the_rounding_of_a_decimal_factor(tokens, factor, experts, capacity):
    assert tokens * factor / experts > capacity
    assert ECDiTConfig(experts=experts, capacity_factor=factor).capacity(1, tokens) == capacity


def test_a_layer_may_have_a_capacity_of_its_own():
    config = ECDiTConfig(experts=8, capacity_factor=2.0, capacity_overrides={3: 1.0, 5: 0.5})
    assert [config.capacity(layer, 64) for layer in (1, 3, 5, 7)] == [16, 8, 4, 16]
    asking = replace(config, routing="token_choice", top_k=2)
    assert [asking.capacity(layer, 64) for layer in (1, 3, 5, 7)] == [32, 16, 8, 32]


def test_every_second_layer_has_experts():
    config = ECDiTConfig()
    assert [layer for layer in range(8) if config.is_moe(layer)] == [1, 3, 5, 7]
    assert [layer for layer in range(8) if replace(config, moe_every=3).is_moe(layer)] == [2, 5]
    assert all(replace(config, moe_every=1).is_moe(layer) for layer in range(8))
    assert [layer for layer in range(8) if replace(config, moe_every=1, dense_first=5).is_moe(layer)] == [5, 6, 7]
    assert [layer for layer in range(8) if replace(config, dense_first=2).is_moe(layer)] == [3, 5, 7]
    for dense in ({"experts": 0}, {"routing": "dense"}, {"dense_first": 28}, {"layers": 1}):
        changed = replace(config, **dense)
        assert not any(changed.is_moe(layer) for layer in range(changed.layers)) and not changed.has_experts
    assert config.has_experts


def test_a_balance_loss_is_handed_on_where_there_is_one():
    balanced = ECDiTConfig(routing="token_choice", balance_loss=0.1)
    assert balanced.has_balance_loss
    for other in ({"balance_loss": 0.0}, {"experts": 0}, {"routing": "expert_choice"}, {"dense_first": 28}):
        assert not replace(balanced, **other).has_balance_loss


def test_lengths_follow_from_the_shape():
    config = ECDiTConfig(width=64, ffn_ratio=3, image_size=24, patch=4)
    assert (config.hidden, config.tokens) == (192, 36)
    assert (config.expert_hidden, config.shared_hidden) == (192, 0)
    assert replace(config, expert_ratio=0.5).expert_hidden == 32
    assert (config.output_channels, replace(config, out_channels=5).output_channels) == (8, 5)
    # A shared expert is as wide as an expert unless it is said to be otherwise.
    assert replace(config, shared_experts=2).shared_hidden == 384
    assert replace(config, shared_experts=2, expert_ratio=0.5).shared_hidden == 64
    assert replace(config, shared_experts=3, expert_ratio=0.5, shared_ratio=1.5).shared_hidden == 288


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


def test_routing_presets_name_fields_of_the_configuration():
    """And none that only a size has, so that any size goes with any way to route."""
    names = {known.name for known in fields(ECDiTConfig)}
    sizes = {"layers", "width", "heads", "kv_heads", "head_width", "image_size", "channels", "patch", "preset"}
    for name, changes in ROUTING_PRESETS.items():
        assert changes.keys() <= names - sizes, name
        assert ECDiTConfig(**changes).has_experts, name
        defaults = ECDiTConfig()
        assert name == "ec-dit" or any(getattr(defaults, key) != value for key, value in changes.items())


def test_ec_dit_routes_by_default():
    assert ECDiTConfig(**ROUTING_PRESETS["ec-dit"]) == ECDiTConfig()


def test_nucleus_experts_are_as_wide_as_published():
    assert ECDiTConfig(width=2048, **ROUTING_PRESETS["nucleus"]).expert_hidden == 1344
