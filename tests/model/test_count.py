"""The closed-form FLOPs against torch's counter on a real forward."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadit.model.count import end_flops, forward_flops, layer_flops, stage_costs
from megadit.model.ecdit import ECDiT

CASES = {
    "experts": {},
    "all_experts": {"moe_every": 1},
    "odd_capacity": {"experts": 3, "capacity_factor": 1.0},
    "capacity_of_all": {"experts": 2, "capacity_factor": 4.0},
    "dense": {"experts": 0},
    "gated": {"modulation": "gated"},
    "all_heads": {"kv_heads": 4},
    "narrow_experts_and_wide_patches": {"ffn_ratio": 2, "patch": 4},
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
        times = torch.full((images,), 0.5).double()
        # The counter knows matrix products, not the fused attention of a CPU: the plain one is made of products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = stage(*carry, timesteps_B=times, text_ids_BL=ids, text_mask_BL=ids > 0, size=size)
            if backward:
                out.sum().backward()
        return counter.get_total_flops()

    return run


@pytest.mark.parametrize("case", CASES)
def test_forward_flops_are_what_torch_counts(count, config, text, case):
    config = replace(config, **CASES[case])
    assert forward_flops(config, text) == count(config)
    assert 3 * forward_flops(config, text) == count(config, images=3)


@pytest.mark.parametrize("layers", [0, 3])
def test_flops_of_other_captions_are_what_torch_counts(count, config, text, layers):
    text = replace(text, layers=layers, length=11, width=24, heads=4)
    assert forward_flops(config, text) == count(config, text=text)


@pytest.mark.parametrize("layers", [range(1), range(2), range(1, 2), range(2, 3), range(3, 4)], ids=str)
def test_a_stage_costs_what_torch_counts(count, config, text, layers):
    assert sum(stage_costs(config, text)[layers.start : layers.stop]) == count(config, layers)


def test_costs_are_layers_with_the_ends_on_the_outermost(config, text):
    first, last = end_flops(config, text)
    layers = [layer_flops(config, text, layer) for layer in range(4)]
    assert stage_costs(config, text) == [layers[0] + first, *layers[1:3], layers[3] + last]


def test_a_training_step_takes_three_forwards_but_for_the_inputs_gradients(count, config, text):
    step = count(config, backward=True)
    unneeded = 2 * (config.tokens * 12 * config.width + 256 * config.width)  # of the image and the time features
    assert step == 3 * forward_flops(config, text) - unneeded
