"""Nucleus-Image as diffusers has it: its mixtures of experts are ours, and the rest is refused."""

import pytest
import torch

from megadit.conversion.diffusers import ARCHITECTURES
from megadit.conversion.nucleus import moe_layer
from megadit.model.config import ROUTING_PRESETS, ECDiTConfig
from megadit.model.ecdit import whole_model
from megadit.model.text import TextConfig
from tests.conversion.networks import converted, numbers, same_bits

nucleus = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
NAME = "NucleusMoEImageTransformer2DModel"
PREFIXES = "blocks.3.feedforward", "transformer_blocks.3.img_mlp"


@pytest.fixture
def layers():
    """(theirs, ours with its weights, the rules)."""
    changes = {"width": 32, "layers": 4, "experts": 6, "capacity_factor": 2.0}
    config = ECDiTConfig(**(ROUTING_PRESETS["nucleus"] | changes))
    theirs = nucleus.NucleusMoELayer(32, config.expert_hidden, 6, 2.0, False, config.route_scale)
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.2 * numbers(seed, *parameter.shape))
    rules = moe_layer(*PREFIXES)
    state = converted(rules, {f"{PREFIXES[1]}.{name}": value for name, value in theirs.state_dict().items()})
    ours = whole_model(config, TextConfig()).blocks["3"].feedforward.to_empty(device="cpu")
    ours.load_state_dict({name.removeprefix(f"{PREFIXES[0]}."): value for name, value in state.items()}, strict=True)
    return theirs, ours, rules


def test_a_mixture_of_experts_computes_the_same_with_its_weights(layers):
    theirs, ours, _ = layers
    modulated, plain, time = numbers(11, 2, 18, 32), numbers(12, 2, 18, 32), numbers(13, 2, 32)
    expected = theirs(modulated, plain, timestep=time)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(modulated, plain, time)[0], expected, rtol=0, atol=1e-5)


def test_weights_go_there_and_back_bit_for_bit(layers):
    theirs, ours, rules = layers
    back = converted(rules, {f"{PREFIXES[0]}.{name}": value for name, value in ours.state_dict().items()}, False)
    assert same_bits(back, {f"{PREFIXES[1]}.{name}": value for name, value in theirs.state_dict().items()})


def test_experts_may_be_moved_one_by_one(layers):
    (rule,) = [rule for rule in layers[2] if "experts.gate_up_proj" in rule.theirs[0]]
    whole = layers[0].experts.gate_up_proj.detach()
    ours = [torch.stack(parts) for parts in zip(*(rule.to_ours([expert]) for expert in whole), strict=True)]
    for one, other in zip(ours, rule.to_ours([whole]), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.stack([rule.to_theirs(pair)[0] for pair in zip(*ours, strict=True)]), whole)


def test_the_whole_network_is_refused_with_all_reasons():
    architecture = ARCHITECTURES[NAME]
    asked = (
        lambda: architecture.sections({"_class_name": NAME}),
        lambda: architecture.their_config(ECDiTConfig(), TextConfig()),
        lambda: architecture.rules(ECDiTConfig(), TextConfig()),
    )
    for ask in asked:
        with pytest.raises(ValueError, match=NAME) as refusal:
            ask()
        for reason in ("add_k_proj", "rotary", "img_mod", "encoder_proj", "time_text_embed", "mlp_ratio", "proj_out"):
            assert reason in str(refusal.value), reason
