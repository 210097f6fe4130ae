"""Networks of diffusers beside ours: theirs with random weights, ours with theirs, and inputs for both."""

import torch

from megadit.conversion.diffusers import ARCHITECTURES
from megadit.model.config import ECDiTConfig
from megadit.model.ecdit import whole_model
from megadit.model.text import TextConfig


def their_network(kind, settings, dtype=torch.float32):
    """In eval mode, where nothing is dropped; no parameter is zero or one."""
    theirs = kind(**settings).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Small, so that no layer drowns another; biases and tables too.
            scale = 0.15 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return theirs


def our_config(settings, name, **changes):
    """(our configuration, that of the text) for theirs."""
    sections = ARCHITECTURES[name].sections(settings)
    return ECDiTConfig(**(sections["model"] | changes)), TextConfig(**sections["text"])


def converted(rules, state, to_ours=True):
    """Tensors by name through the rules; every one is named by one rule."""
    state, out = dict(state), {}
    for rule in rules:
        here, there = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        tensors = (rule.to_ours if to_ours else rule.to_theirs)([state.pop(name) for name in here])
        assert len(tensors) == len(there) and not set(there) & set(out)
        out |= dict(zip(there, tensors, strict=True))
    assert not state
    return out


def our_network(theirs, name, **changes):
    """Ours with the weights of theirs, of the same dtype."""
    config, text = our_config(theirs.config, name, **changes)
    state = converted(ARCHITECTURES[name].rules(config, text), theirs.state_dict())
    ours = whole_model(config, text)
    ours.to_empty(device="cpu").to(theirs.dtype)
    ours.load_state_dict(state, strict=True)
    return ours


def there_and_back(theirs, name):
    """A network of their class with the weights that have been ours, which are the same bits."""
    config, text = our_config(theirs.config, name)
    rules = ARCHITECTURES[name].rules(config, text)
    state = theirs.state_dict()
    ours = converted(rules, state)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in whole_model(config, text).named_parameters()
    }
    back = converted(rules, ours, to_ours=False)
    assert same_bits(back, state)
    their_config = ARCHITECTURES[name].their_config(config, text)
    again = type(theirs).from_config(their_config)
    again.load_state_dict(back, strict=True)
    assert our_config(their_config, name) == (config, text)
    return again


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same_bits(one, other):
    """Whether two dictionaries hold the same tensors, bit for bit."""
    assert one.keys() == other.keys()
    return all(
        one[key].shape == other[key].shape
        and one[key].dtype == other[key].dtype
        and torch.equal(bits(one[key]), bits(other[key]))
        for key in one
    )


def numbers(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def times_of(steps):
    """Our times of their timesteps, of which 1000 times the rounded time is the step again."""
    times = torch.tensor(steps, dtype=torch.float32) / 1000
    assert torch.equal(1000 * times, torch.tensor(steps, dtype=torch.float32))
    return times


def assert_same_gradients(theirs, ours, rules):
    """Of every parameter, in float64."""
    found = converted(rules, {name: parameter.grad for name, parameter in ours.named_parameters()}, to_ours=False)
    for name, parameter in theirs.named_parameters():
        # A bias of the keys moves all scores of a query alike: its gradient is nothing but rounding.
        assert (parameter.grad.norm() > 1e-3) != name.endswith("to_k.bias"), name
        torch.testing.assert_close(found.pop(name), parameter.grad, rtol=1e-9, atol=1e-12)
    assert not found
