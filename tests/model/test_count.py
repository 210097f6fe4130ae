"""The closed-form FLOPs against torch's counter on a real forward and backward."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megadit.model.config import PRESETS, ROUTING_PRESETS, ECDiTConfig
from megadit.model.count import (
    PAPER_TEXT,
    Flops,
    end_flops,
    flops_by_part,
    flops_of,
    forward_flops,
    layer_flops,
    products_of,
    stage_costs,
)
from megadit.model.ecdit import ECDiT, whole_model
from tests.tiers import slow_but

# The counter knows the fused attention of GPUs, and its two formulas hold for that of a CPU too.
aten = torch.ops.aten
FUSED_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **options: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **options: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


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
QUICK = ("experts", "dense", "shared_experts", "token_choice", "dropless", "groups", "adaln_single", "nucleus")


@pytest.fixture
def count(text, region, grid, filled):
    """A function that runs layers of a model on some images and counts: (FLOPs forward, FLOPs backward)."""

    def run(config, layers=None, text=text, images=1, recompute="none", fused=False, backward=True, **of_inputs):
        layers = layers or range(config.layers)
        stage = filled(ECDiT(config, text, layers, region, grid["ep"], recompute))
        carry, keywords = inputs(config, text, images, layers.start == 0, **of_inputs)
        return counted(stage, [x.double() for x in carry], keywords, fused, backward)

    return run


def inputs(config, text, images, is_first=True, size=None, seen=None):
    """Carry and keywords of a stage for so many images, of which the first `seen` tokens are seen."""
    size = size or (config.image_size, config.image_size)
    carry = [torch.ones(images, config.channels, *size)]
    if not is_first:
        shapes = [(config.tokens, config.width), (config.width,), (text.length, text.width)]
        if config.modulation == "shared":
            shapes.insert(2, (6, config.width))
        carry = [torch.ones(images, *shape, requires_grad=True) for shape in shapes]
    ids = torch.full((images, text.length), 2)
    captions = {"text_ids_BL": ids, "text_mask_BL": ids > 0}
    if text.is_frozen:
        captions["text_states_BLC"] = torch.ones(images, text.length, text.channels)
    if text.pooled:
        captions["text_pooled_BP"] = torch.ones(images, text.pooled)
    labels = {"labels_B": torch.zeros(images, dtype=torch.int64)}
    keywords = {"timesteps_B": torch.full((images,), 0.5), "size": size}
    if seen is not None:
        keywords["kept_BT"] = torch.arange(seen).expand(images, -1)
    return carry, keywords | (captions if config.conditioning == "text" else labels)


def counted(stage, carry, keywords, fused, backward=True):
    """(FLOPs forward, FLOPs backward). Attention is fused, or the plain one that is made of products."""
    dtype = next(stage.parameters()).dtype
    keywords = {key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for key, x in keywords.items()}
    backend = SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    with sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter:
        out = stage(*carry, **keywords)
        forward = counter.get_total_flops()
        if backward:
            sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
    return forward, counter.get_total_flops() - forward


def images_of(config):
    """The fewest images that can be routed."""
    return config.routing_group if isinstance(config.routing_group, int) else 1


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_forward_flops_are_what_torch_counts(count, config, text, case):
    config = replace(config, **CASES[case])
    images = 2 * images_of(config)
    assert images * forward_flops(config, text) == count(config, images=images, backward=False)[0]


# Images of other sizes, and of which the network sees a part: their tokens, and how they come to be so many.
TOKENS = {
    "wide": (24, {"size": (8, 12)}),
    "tall": (10, {"size": (10, 4)}),
    "half": (8, {"seen": 8}),
    "part_of_a_wide_one": (7, {"size": (8, 12), "seen": 7}),
}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("changes", [{}, {"routing_group": 2}, {"experts": 0, "positions": "rotary", "head_width": 8}])
def test_flops_of_other_numbers_of_tokens_are_what_torch_counts(count, config, text, changes, tokens):
    config, (number, of_inputs) = replace(config, **changes), TOKENS[tokens]
    ours = flops_of(products_of(config, text, 2, tokens=number), fused=True)
    assert (ours.forward, ours.backward + ours.again) == count(config, images=2, fused=True, **of_inputs)
    assert 2 * forward_flops(config, text, number) == ours.forward
    costs = stage_costs(config, text, number)
    assert 2 * costs[0] == count(config, range(1), images=2, backward=False, **of_inputs)[0]


@pytest.mark.parametrize("case", ["shared_experts", "groups", "token_choice", "dropless", "timestep_router"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_layer_of_experts_costs_what_torch_counts(count, config, text, layer, case):
    config = replace(config, **CASES[case], layers=5)
    images = images_of(config)
    assert (
        images * layer_flops(config, text, layer)
        == count(config, range(layer, layer + 1), images=images, backward=False)[0]
    )


def test_cost_of_a_group_must_be_known(config, text):
    with pytest.raises(AssertionError, match="number of images"):
        forward_flops(replace(config, routing_group="batch"), text)


@pytest.mark.parametrize("layers", [0, 3])
def test_flops_of_other_captions_are_what_torch_counts(count, config, text, layers):
    text = replace(text, layers=layers, length=11, width=24, heads=4)
    assert forward_flops(config, text) == count(config, text=text, backward=False)[0]


@pytest.mark.parametrize("pooled", [0, 24])
def test_flops_of_states_are_what_torch_counts(count, config, text, pooled):
    text = replace(text, kind="precomputed", channels=40, length=11, pooled=pooled)
    assert forward_flops(config, text) == count(config, text=text, backward=False)[0]


@pytest.mark.parametrize("changes", [{}, {"modulation": "shared"}, {"embedders": "per_layer"}], ids=str)
@pytest.mark.parametrize("layers", [range(1), range(2), range(1, 2), range(2, 3), range(3, 4)], ids=str)
def test_a_stage_costs_what_torch_counts(count, config, text, layers, changes):
    config = replace(config, **changes)
    assert sum(stage_costs(config, text)[layers.start : layers.stop]) == count(config, layers, backward=False)[0]


def test_costs_are_layers_with_the_ends_on_the_outermost(config, text):
    first, last = end_flops(config, text)
    layers = [layer_flops(config, text, layer) for layer in range(4)]
    assert stage_costs(config, text) == [layers[0] + first, *layers[1:3], layers[3] + last]


def test_a_training_step_takes_three_forwards_but_for_the_inputs_gradients(count, config, text):
    unneeded = 2 * (config.tokens * 12 * config.width + 256 * config.width)  # of the image and the time features
    assert sum(count(config)) == 3 * forward_flops(config, text) - unneeded


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_both_passes_are_what_torch_counts(count, config, text, case):
    pooled = 0 if "per_layer" in case else 24
    config, text = replace(config, **CASES[case]), replace(text, kind="precomputed", channels=40, pooled=pooled)
    images = 2 * images_of(config)
    for recompute, fused in [("block", True), ("moe", False)]:
        ours = flops_of(products_of(config, text, images), recompute, fused)
        theirs = count(config, text=text, images=images, recompute=recompute, fused=fused)
        assert (ours.forward, ours.backward + ours.again) == theirs, (recompute, fused)


@pytest.mark.parametrize("fused", [False, True])
def test_both_passes_of_other_captions_are_what_torch_counts(count, config, text, fused):
    text = replace(text, layers=3, length=11, width=24, heads=4)
    ours = flops_of(products_of(config, text, 1), fused=fused)
    assert (ours.forward, ours.backward + ours.again) == count(config, text=text, fused=fused)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"modulation": "shared"}, {"embedders": "per_layer"}], ids=str)
@pytest.mark.parametrize("layers", [range(1), range(2), range(1, 2), range(2, 3), range(3, 4)], ids=str)
def test_both_passes_of_a_stage_are_what_torch_counts(count, config, text, layers, changes):
    config = replace(config, **changes)
    ours = flops_of(products_of(config, text, 2, layers), "block", fused=True)
    theirs = count(config, layers, images=2, recompute="block", fused=True)
    assert (ours.forward, ours.backward + ours.again) == theirs


@pytest.mark.parametrize("preset", ["ec-dit-m-64e", "pixart-xl-2", "dit-xl-2"])
def test_both_passes_of_large_layers_are_what_torch_counts(preset):
    config = ECDiTConfig(**PRESETS[preset] | {"layers": 4})
    ours = flops_of(products_of(config, PAPER_TEXT, 3), fused=False)
    with torch.device("meta"):
        theirs = counted(whole_model(config, PAPER_TEXT), *inputs(config, PAPER_TEXT, 3), fused=False)
    assert (ours.forward, ours.backward + ours.again) == theirs


def test_images_must_fill_groups(config, text):
    with pytest.raises(AssertionError, match="3 images do not fill routing groups of 2"):
        products_of(replace(config, routing_group=2), text, 3)


def test_parts_make_the_whole(config, text):
    products = products_of(config, text, 2)
    parts = flops_by_part(products, "moe")
    assert sum(parts.values(), Flops()) == flops_of(products, "moe")
    assert {part for part, flops in parts.items() if flops.again} == {
        *("router", "experts", "text"),
        *("attention_scores", "cross_attention_scores"),
    }
    # Two layers have experts: 4 of them take 8 of 16 tokens of 2 images, 4 multiply-adds per weight of two matrices.
    assert parts["experts"] == Flops(*(2 * 2 * 4 * 2 * 8 * 2 * 32 * 128 * times for times in (1, 2, 1)))
