"""The average follows its formula, and swapping it in leaves no trace."""

import pytest
import torch
from torch import nn

from megadit.training.ema import Ema, EmaConfig


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "vector": (5,), "scalar": ()}
    named = [(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for name, shape in shapes.items()]
    # Not contiguous, as a transposed view would be.
    return [*named, ("transposed", nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype).T))]


@torch.no_grad()
def change(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize("limit", [0.15, 0.999])  # the first is reached at the second step, the other never
def test_five_updates_follow_the_formula(limit):
    named = parameters()
    ema = Ema(named, EmaConfig(decay=limit))
    expected = copies(named)
    for step in range(1, 6):
        change(named, step)
        ema.update(step)
        decay = min(limit, step / (step + 9))
        for name, parameter in named:
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
            torch.testing.assert_close(ema.average[name], expected[name], rtol=1e-14, atol=1e-15)


def test_it_starts_at_the_weights_and_shares_no_memory_with_them():
    named = parameters()
    start = copies(named)
    ema = Ema(named, EmaConfig())
    change(named, 1)
    for name, _ in named:
        assert torch.equal(ema.average[name], start[name])
        assert ema.average[name].is_contiguous()
        assert not ema.average[name].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fails", [False, True])
def test_swapping_in_shows_the_averages_and_restores_the_weights_bitwise(fails, dtype):
    named = parameters(dtype)
    ema = Ema(named, EmaConfig())
    change(named, 1)
    ema.update(1)
    weights, averages = copies(named), copies(ema.average.items())
    pointers = [parameter.data_ptr() for _, parameter in named]
    try:
        with ema.swapped_in():
            for name, parameter in named:
                assert torch.equal(parameter, averages[name])
                assert not torch.equal(parameter, weights[name])
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    for name, parameter in named:
        assert torch.equal(parameter, weights[name])
        assert torch.equal(ema.average[name], averages[name])
    assert [parameter.data_ptr() for _, parameter in named] == pointers, "an optimizer holds views of them"


def test_swapping_in_works_within_inference_without_gradients():
    named = parameters()
    ema = Ema(named, EmaConfig())
    with ema.swapped_in():
        assert torch.is_grad_enabled() is False
    assert all(parameter.requires_grad for _, parameter in named)
