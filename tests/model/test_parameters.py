"""The closed-form parameters against those of networks on the meta device, and the sizes of the paper."""

from dataclasses import fields, replace

import pytest
import torch

from megadit.model.config import PAPER_SIZES, PRESETS, ROUTING_PRESETS, ECDiTConfig
from megadit.model.count import (
    PAPER_TEXT,
    Kind,
    Parameters,
    activated_parameters,
    frozen_parameters,
    on_rank,
    parameters,
    residuals,
    size_of,
    weights_of,
)
from megadit.model.ecdit import ECDiT, whole_model
from megadit.model.text import TextConfig
from megadit.model.weights import decays
from megadit.parallel.grid import Group
from megadit.parallel.placement import placement_of
from megadit.parallel.tensor.mappings import ReplicatedTokens
from megadit.training.config import load_config
from megadit.zero.groups import group_parameters
from tests.parity.cases import MODELS, SHAPES

NETWORKS = {name: load_config("tests/configs/parity.yaml", changes) for name, changes in (MODELS | SHAPES).items()}
TEXTS = [TextConfig(layers=3), PAPER_TEXT, TextConfig(kind="t5+clip", width=96, pooled=768)]


def axes_of(parameter):
    return tuple(axis for cut in placement_of(parameter).cuts for axis in cut.axes)


def listed(config, text):
    """(name, shape, axes) of each parameter, as the network has them and as they are counted."""
    theirs = [(name, tuple(p.shape), axes_of(p)) for name, p in whole_model(config, text).named_parameters()]
    return theirs, [(weight.name, weight.shape, weight.axes) for weight in weights_of(config, text)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_the_network_s(name):
    theirs, ours = listed(NETWORKS[name].model, NETWORKS[name].text)
    assert ours == theirs


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.kind)
@pytest.mark.parametrize("changes", [{}, *ROUTING_PRESETS.values()], ids=["", *ROUTING_PRESETS])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_a_preset_is_the_network_s(preset, changes, text):
    config = ECDiTConfig(**PRESETS[preset] | {"layers": 6} | changes)
    theirs, ours = listed(config, text)
    assert ours == theirs


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_are_those_of_the_whole_network(preset):
    config = ECDiTConfig(**PRESETS[preset])
    network = whole_model(config, PAPER_TEXT)
    size = size_of(config, PAPER_TEXT)
    assert size.trained.total == sum(p.numel() for p in network.parameters())
    assert size.total == size.trained.total + size.frozen.total


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_rank_s_share_is_what_zero_groups(name, tp, ep):
    config, text = replace(NETWORKS[name].model, routing_group="sample"), NETWORKS[name].text
    for layers in (range(3), range(1, 4), range(4, config.layers)):
        with torch.device("meta"):
            stage = ECDiT(config, text, layers, ReplicatedTokens(Group(None, tp, 0)), Group(None, ep, 0))
        groups = group_parameters(list(stage.named_parameters()), 0.1, decays)
        theirs = {
            Kind(group.is_expert, group.weight_decay > 0): sum(p.numel() for p in group.parameters) for group in groups
        }
        assert on_rank(weights_of(config, text, layers), tp, ep) == theirs


def test_parts_make_the_whole():
    config = NETWORKS["nucleus"].model
    weights = weights_of(config, PAPER_TEXT)
    counts = parameters(weights)
    assert counts.total == sum(weight.count for weight in weights)
    # Of 7 layers with 8 swiglu experts of hidden width 16, one shared one, and a router that reads the time too.
    assert counts.experts == 7 * 8 * 3 * 32 * 16
    assert counts.shared_experts == 7 * 3 * 32 * 16
    assert counts.router == 7 * 8 * 64
    assert counts.feedforward == 3 * 32 * 128
    assert counts.norms == 8 * 4 * 4
    assert counts.text == 1024 * 1024 * 2 + 1024 * 2
    assert counts.head == 2 * 32 * 32 + 2 * 32 + 4 * 32 + 4
    every = parameters(weights_of(replace(config, conditioning="class", classes=3), PAPER_TEXT))
    missing = {field.name for field in fields(Parameters) if not getattr(every, field.name)}
    assert every.classes == 4 * 32
    assert missing == {"text", "cross_attention"}


def activated_of(**changes):
    """(all parameters, those of one expert in each layer that has any, activated ones)."""
    config = replace(NETWORKS["expert_choice"].model, **changes)
    counts = parameters(weights_of(config, PAPER_TEXT))
    return counts.total, counts.experts // config.experts, activated_parameters(config, PAPER_TEXT)


@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({}, 2),
        ({"capacity_factor": 1.25}, 1.25),
        ({"capacity_factor": 3.0, "capacity_overrides": {1: 1.0, 7: 5.0}}, 3),
        ({"capacity_factor": 100.0}, 8),
        ({"routing": "token_choice", "top_k": 3, "capacity_factor": 1.5}, 3),
        ({"routing": "token_choice", "top_k": 1, "dropless": True}, 1),
    ],
    ids=str,
)
def test_activated_are_the_experts_that_compute_a_token(changes, experts):
    total, each, activated = activated_of(**changes)
    assert activated == total - (8 - experts) * each


def test_a_dense_model_is_activated_whole():
    config = NETWORKS["dense"].model
    assert activated_parameters(config, PAPER_TEXT) == parameters(weights_of(config, PAPER_TEXT)).total


def test_only_states_of_captions_come_with_frozen_networks():
    config = NETWORKS["expert_choice"].model
    assert frozen_parameters(config, PAPER_TEXT).total == 670_000_000 + 84_000_000
    assert frozen_parameters(config, TextConfig()).total == 0
    assert frozen_parameters(replace(config, conditioning="class", classes=3), PAPER_TEXT).total == 0


def paper_size(preset):
    return size_of(ECDiTConfig(**PRESETS[preset]), PAPER_TEXT)


@pytest.mark.parametrize(("size", "layers", "width"), [("xl", 28, 1152), ("xxl", 38, 1536), ("3xl", 42, 2304)])
def test_experts_are_all_that_a_sparse_model_has_more(size, layers, width):
    dense, sparse = paper_size(f"ec-dit-{size}"), paper_size(f"ec-dit-{size}-32e")
    gap = (32 - 1) * 8 * width**2 * layers // 2
    assert sparse.trained.experts + sparse.trained.feedforward - dense.trained.feedforward == gap
    # A router for each of them apart, which the paper's digits do not show.
    assert sparse.total - dense.total == gap + 32 * width * layers // 2 == gap + sparse.trained.router


def test_the_paper_s_sizes():
    found = {residual.name: residual for residual in residuals()}
    assert set(found) == {*PAPER_SIZES, "ec-dit-m-64e activated"}
    for name, residual in found.items():
        assert residual.ratio == residual.ours / residual.paper
        bound = 0.03 if "activated" in name else 0.015 if name.endswith("e") else 0.06
        assert abs(residual.ratio - 1) < bound, residual
    m = paper_size("ec-dit-m-64e")
    assert (found["ec-dit-m-64e"].ours, found["ec-dit-m-64e activated"].ours) == (m.total, m.activated)
    assert m.total - m.activated == (64 - 2) * 8 * 3072**2 * 19
