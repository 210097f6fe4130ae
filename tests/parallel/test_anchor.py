"""A tensor that depends on no input of a stage, in a backward pass that is split into inputs and weights."""

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from megadit.parallel.pipeline.anchor import anchored

X, OUT, TIME = ((1.0 + torch.arange(6.0).roll(i)).double().view(2, 3) for i in range(3))


def stage(embedder, linear, x, anchor):
    """Modulated twice by what an embedder makes of a keyword argument; the second time behind a layer."""
    made = embedder(TIME)
    if anchor:
        made = anchored(made, x)
    return linear((x * made).sin()) * made


@pytest.fixture
def problem():
    torch.manual_seed(0)
    embedder, linear = (torch.nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
    return embedder, linear, X.clone().requires_grad_(), [*embedder.parameters(), *linear.parameters()]


def split_backward(embedder, linear, x, parameters, anchor):
    (of_x,), later = stage_backward_input([stage(embedder, linear, x, anchor)], [OUT], [x], iter(parameters))
    assert all(parameter.grad is None for parameter in parameters)
    stage_backward_weight(iter(parameters), later)
    return [of_x, *(parameter.grad for parameter in parameters)]


def test_gradients_are_those_of_a_whole_backward(problem):
    embedder, linear, x, parameters = problem
    wanted = torch.autograd.grad(stage(embedder, linear, x, False), [x, *parameters], OUT)
    assert torch.equal(stage(embedder, linear, x, True), stage(embedder, linear, x, False))
    for found, want in zip(split_backward(*problem, anchor=True), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-14, atol=0)


def test_without_an_anchor_torch_refuses(problem):
    """When this fails, torch can do it by itself and nothing needs an anchor."""
    with pytest.raises(RuntimeError, match="second time"):
        split_backward(*problem, anchor=False)


def test_nothing_flows_to_the_anchor():
    x, carried = X.clone().requires_grad_(), OUT.clone().requires_grad_()
    (anchored(x, carried) * TIME).sum().backward()
    assert torch.equal(x.grad, TIME) and carried.grad is None
