"""The whole network: its stages chained by hand are the network, whatever the cut."""

from dataclasses import replace

import pytest
import torch

from megadit.model.ecdit import ECDiT

IDS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 3, 0, 0, 0, 0]])


@pytest.fixture
def build(config, text, region, grid, filled):
    def stage(layers, recompute=False, **changes):
        return filled(ECDiT(replace(config, **changes), text, layers, region, grid["ep"], recompute))

    return stage


@pytest.fixture
def inputs(randn):
    """The image and the keyword arguments."""
    times = torch.tensor([0.3, 0.9], dtype=torch.float64)
    return randn(2, 3, 8, 8), {"timesteps_B": times, "text_ids_BL": IDS, "text_mask_BL": IDS != 0, "size": (8, 8)}


@pytest.mark.parametrize("modulation", ["scale_shift", "gated"])
@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)])
def test_chained_stages_are_the_network(build, inputs, cuts, modulation):
    image, keywords = inputs
    whole = build(range(4), modulation=modulation)
    stages = [build(range(*ends), modulation=modulation) for ends in zip(cuts, cuts[1:], strict=False)]
    carry = (image,)
    for stage in stages[:-1]:
        carry = stage(*carry, **keywords)
        assert [part.shape for part in carry] == [(2, 16, 32), (2, 32), (2, 6, 16)]
    velocity = stages[-1](*carry, **keywords)
    assert velocity.shape == image.shape
    assert torch.equal(velocity, whole(image, **keywords))
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name, _ in whole.named_parameters()}


def test_router_stats_are_under_the_global_layer(build, inputs):
    image, keywords = inputs
    first, last = build(range(3)), build(range(3, 4))
    assert first.router_stats() == {}
    last(*first(image, **keywords), **keywords)
    assert list(first.router_stats()) == [1] and list(last.router_stats()) == [3]
    assert 0 < last.router_stats()[3].entropy.item() <= 1


def test_every_input_matters_and_images_do_not_mix(build, inputs):
    image, keywords = inputs
    network = build(range(4))
    velocity = network(image, **keywords)
    for key, other in {"timesteps_B": torch.tensor([0.3, 0.1]).double(), "text_ids_BL": IDS.clamp_max(5)}.items():
        assert (network(image, **(keywords | {key: other})) - velocity).abs().max() > 1e-3
    changed = network(torch.stack([image[0], -image[1]]), **keywords)
    torch.testing.assert_close(changed[0], velocity[0], rtol=0, atol=1e-13)
    assert (changed[1] - velocity[1]).abs().max() > 1e-3


def test_recomputing_changes_no_gradient(build, inputs):
    image, keywords = inputs
    gradients = []
    for recompute in (False, True):
        network = build(range(4), recompute)
        network(image, **keywords).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert torch.equal(recomputed[name], gradient), name
