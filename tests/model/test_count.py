"""The closed-form FLOPs against torch's counter on a real forward."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadit.model.config import ROUTING_PRESETS
from megadit.model.count import end_flops, forward_flops, layer_flops, stage_costs
from megadit.model.ecdit import ECDiT


def preset_of(name):
    """A routing preset with few experts and one dense layer; `batch` stands for the images of a microbatch."""
    changes = ROUTING_PRESETS[name] | {"experts": 4, "capacity_factor": 2.0, "dense_first": 1}
    return changes | ({"routing_group": 2} if changes.get("routing_group") == "batch" else {})


CASES = {
    "experts": {},
    "all_experts": {"moe_every": 1},
    "odd_capacity": {"experts": 3, "capacity_factor": 1.0},
    "capacity_of_all": {"experts": 2, "capacity_factor": 4.0},
    "dense": {"experts": 0},
    "gated": {"modulation": "gated"},
    "all_heads": {"kv_heads": 4},
    "narrow_experts_and_wide_patches": {"ffn_ratio": 2, "patch": 4},
    "swiglu": {"feedforward": "swiglu"},
    "expert_ratio": {"expert_ratio": 1.5},
    "shared_expert": {"shared_experts": 1},
    "shared_experts": {"shared_experts": 2, "shared_ratio": 0.5, "feedforward": "swiglu"},
    "shared_experts_as_experts": {"shared_experts": 3, "expert_ratio": 0.75},
    "timestep_router": {"router_input": "timestep"},
    "routing_dense": {"routing": "dense"},
    "dense_first": {"dense_first": 2, "moe_every": 1},
    "capacity_overrides": {"capacity_overrides": {1: 0.5, 3: 1.0}},
    "token_choice": {"routing": "token_choice", "capacity_factor": 1.0},
    "balanced": {"routing": "token_choice", "balance_loss": 0.1, "balance_counts": "first"},
    "odd_capacity_of_a_choice": {"routing": "token_choice", "capacity_factor": 1.0, "experts": 3, "top_k": 1},
    "token_choice_overrides": {"routing": "token_choice", "top_k": 1, "capacity_overrides": {3: 0.5}},
    "dropless": {"routing": "token_choice", "dropless": True, "top_k": 3},
    "groups": {"routing_group": 3, "experts": 5, "capacity_factor": 1.0},
    "groups_of_token_choice": {"routing_group": 6, "routing": "token_choice", "experts": 5, "capacity_factor": 1.0},
    "dropless_groups": {"routing_group": 2, "routing": "token_choice", "dropless": True},
    "normalised": {"normalise_gates": True, "route_scale": 2.5, "gate": "sigmoid"},
    "classes": {"conditioning": "class", "classes": 3},
    "adaln_single": {"modulation": "shared"},
    "per_layer_embedders": {"embedders": "per_layer"},
    "per_layer_embedders_of_classes": {"embedders": "per_layer", "conditioning": "class", "classes": 3},
    "learned_variance": {"out_channels": 6},
    "biases": {"bias": True, "feedforward": "swiglu"},
    "biases_of_ragged_experts": {"bias": True, "routing": "token_choice", "dropless": True},
    **{preset: preset_of(preset) for preset in ROUTING_PRESETS},
}


@pytest.fixture
def count(text, region, grid, filled):
    """A function that runs layers of a model on some images and counts the FLOPs, forward alone or with backward."""

    def run(config, layers=None, text=text, images=1, backward=False):
        layers = layers or range(config.layers)
        stage = filled(ECDiT(config, text, layers, region, grid["ep"]))
        size = (config.image_size, config.image_size)
        ids = torch.full((images, text.length), 2)
        carry = [torch.ones(images, config.channels, *size).double()]
        if layers.start > 0:
            widths = (images, config.tokens, config.width), (images, config.width), (images, text.length, text.width)
            carry = [torch.ones(*shape).double() for shape in widths]
            if config.modulation == "shared":
                carry.insert(2, torch.ones(images, 6, config.width).double())
        captions = {"text_ids_BL": ids, "text_mask_BL": ids > 0}
        if text.kind == "states":
            captions["text_states_BLC"] = torch.ones(images, text.length, text.channels).double()
        labels = {"labels_B": torch.zeros(images, dtype=torch.int64)}
        keywords = {"timesteps_B": torch.full((images,), 0.5).double(), "size": size}
        keywords |= captions if config.conditioning == "text" else labels
        # The counter knows matrix products, not the fused attention of a CPU: the plain one is made of products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = stage(*carry, **keywords)
            if backward:
                out.sum().backward()
        return counter.get_total_flops()

    return run


def images_of(config):
    """The fewest images that can be routed."""
    return config.routing_group if isinstance(config.routing_group, int) else 1


@pytest.mark.parametrize("case", CASES)
def test_forward_flops_are_what_torch_counts(count, config, text, case):
    config = replace(config, **CASES[case])
    images = 2 * images_of(config)
    assert images * forward_flops(config, text) == count(config, images=images)


@pytest.mark.parametrize("case", ["shared_experts", "groups", "token_choice", "dropless", "timestep_router"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_layer_of_experts_costs_what_torch_counts(count, config, text, layer, case):
    config = replace(config, **CASES[case], layers=5)
    images = images_of(config)
    assert images * layer_flops(config, text, layer) == count(config, range(layer, layer + 1), images=images)


def test_cost_of_a_group_must_be_known(config, text):
    with pytest.raises(AssertionError, match="number of images"):
        forward_flops(replace(config, routing_group="batch"), text)


@pytest.mark.parametrize("layers", [0, 3])
def test_flops_of_other_captions_are_what_torch_counts(count, config, text, layers):
    text = replace(text, layers=layers, length=11, width=24, heads=4)
    assert forward_flops(config, text) == count(config, text=text)


def test_flops_of_states_are_what_torch_counts(count, config, text):
    text = replace(text, kind="states", channels=40, length=11)
    assert forward_flops(config, text) == count(config, text=text)


@pytest.mark.parametrize("changes", [{}, {"modulation": "shared"}, {"embedders": "per_layer"}], ids=str)
@pytest.mark.parametrize("layers", [range(1), range(2), range(1, 2), range(2, 3), range(3, 4)], ids=str)
def test_a_stage_costs_what_torch_counts(count, config, text, layers, changes):
    config = replace(config, **changes)
    assert sum(stage_costs(config, text)[layers.start : layers.stop]) == count(config, layers)


def test_costs_are_layers_with_the_ends_on_the_outermost(config, text):
    first, last = end_flops(config, text)
    layers = [layer_flops(config, text, layer) for layer in range(4)]
    assert stage_costs(config, text) == [layers[0] + first, *layers[1:3], layers[3] + last]


def test_a_training_step_takes_three_forwards_but_for_the_inputs_gradients(count, config, text):
    step = count(config, backward=True)
    unneeded = 2 * (config.tokens * 12 * config.width + 256 * config.width)  # of the image and the time features
    assert step == 3 * forward_flops(config, text) - unneeded
