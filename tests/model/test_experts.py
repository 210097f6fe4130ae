"""The experts of one rank against a loop over them, in every way that training runs them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from megadit.model.experts import Experts
from megadit.parallel.placement import Cut, placement_of

KINDS = ["gelu", "swiglu", "gelu_bias", "swiglu_bias"]
COUNTS = [3, 0, 5, 1]


@pytest.fixture
def build(config, filled):
    """Four experts of width 32 and hidden width 48, in float64."""

    def experts(kind):
        feedforward, _, bias = kind.partition("_")
        return filled(Experts(4, replace(config, feedforward=feedforward, expert_ratio=1.5, bias=bias == "bias")))

    return experts


def one_expert(experts, i, x):
    """Expert i, by the formula."""
    biases = {name: value[i] for name, value in experts.named_parameters() if name.endswith("_bias")}
    up = x @ experts.up[i] + biases.get("up_bias", 0)
    if experts.gate is None:
        hidden = 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
    else:
        gate = x @ experts.gate[i] + biases.get("gate_bias", 0)
        hidden = gate / (1 + torch.exp(-gate)) * up
    return hidden @ experts.down[i] + biases.get("down_bias", 0)


def gradients(output, weight, leaves):
    return torch.autograd.grad((output * weight).sum(), leaves)


def close(found, wanted):
    for mine, want in zip(found, wanted, strict=True):
        assert want.norm() > 0.1
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gelu", ["up", "down"]),
        ("swiglu", ["up", "gate", "down"]),
        ("gelu_bias", ["up", "down", "up_bias", "down_bias"]),
        ("swiglu_bias", ["up", "gate", "down", "up_bias", "gate_bias", "down_bias"]),
    ],
)
def test_parameters_are_whole_experts_cut_over_expert_and_tensor_axes(build, kind, names):
    parameters = dict(build(kind).named_parameters())
    shapes = {"up": (4, 32, 48), "gate": (4, 32, 48), "down": (4, 48, 32)}
    shapes |= {"up_bias": (4, 48), "gate_bias": (4, 48), "down_bias": (4, 32)}
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == {n: shapes[n] for n in names}
    assert all(placement_of(parameter).cuts == (Cut(0, ("ep", "tp")),) for parameter in parameters.values())


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_a_loop_over_the_experts(build, randn, kind):
    experts, x, weight = build(kind), randn(4, 6, 32).requires_grad_(), randn(4, 6, 32)
    leaves = [x, *experts.parameters()]
    output = experts(x)
    expected = torch.stack([one_expert(experts, i, x[i]) for i in range(4)])
    close([output, *gradients(output, weight, leaves)], [expected, *gradients(expected, weight, leaves)])


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rows_are_computed_each_by_its_expert(build, randn, kind):
    experts, x, weight = build(kind), randn(sum(COUNTS), 32).requires_grad_(), randn(sum(COUNTS), 32)
    leaves = [x, *experts.parameters()]
    output = experts.forward_ragged(x, COUNTS)
    expert_of_row = [i for i, count in enumerate(COUNTS) for _ in range(count)]
    expected = torch.stack([one_expert(experts, i, row) for i, row in zip(expert_of_row, x, strict=True)])
    close([output, *gradients(output, weight, leaves)], [expected, *gradients(expected, weight, leaves)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 0]])
def test_an_expert_without_rows_has_a_gradient_of_zeros(build, randn, kind, counts):
    experts, x = build(kind), randn(sum(counts), 32).requires_grad_()
    output = experts.forward_ragged(x, counts)
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in experts.parameters():
        norms = parameter.grad.flatten(1).norm(dim=1)
        assert (norms > 0).tolist() == [count > 0 for count in counts]


def test_ragged_rows_must_be_as_many_as_the_counts_say(build, randn):
    with pytest.raises(RuntimeError, match="split"):
        build("gelu").forward_ragged(randn(8, 32), [4, 2, 1, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_near_float64(build, randn, kind, dtype, tolerance):
    exact, low, x = build(kind), build(kind).to(dtype), randn(4, 6, 32)
    expected, flat = exact(x), x.flatten(0, 1).to(dtype)
    for output in (low(x.to(dtype)), low.forward_ragged(flat, [6] * 4).view(4, 6, 32)):
        assert output.dtype == dtype
        assert (output.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_as_one_graph(build, randn, kind):
    experts, x, weight = build(kind), randn(4, 6, 32).requires_grad_(), randn(4, 6, 32)
    leaves = [x, *experts.parameters()]
    compiled = torch.compile(experts, fullgraph=True, dynamic=False, backend="aot_eager")
    output, expected = compiled(x), experts(x)
    close([output, *gradients(output, weight, leaves)], [expected, *gradients(expected, weight, leaves)])


def ways(experts):
    """Both ways through the experts, for tokens [4, 6, 32]."""
    return {
        "equal": experts,
        "ragged": lambda x: experts.forward_ragged(x.flatten(0, 1), [9, 0, 14, 1]).view_as(x).clone(),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["equal", "ragged"])
def test_recomputed(build, randn, kind, way):
    experts, x, weight = build(kind), randn(4, 6, 32).requires_grad_(), randn(4, 6, 32)
    leaves, forward = [x, *experts.parameters()], ways(experts)[way]
    again = checkpoint(forward, x, use_reentrant=False)
    close(gradients(again, weight, leaves), gradients(forward(x), weight, leaves))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["equal", "ragged"])
def test_gradients_of_weights_can_come_later_than_those_of_inputs(build, randn, kind, way):
    """Zero-bubble schedules split the backward pass: inputs first, weights when there is time."""
    experts, x, weight = build(kind), randn(4, 6, 32).requires_grad_(), randn(4, 6, 32)
    forward = ways(experts)[way]
    wanted = gradients(forward(x), weight, [x, *experts.parameters()])
    (input_gradient,), later = stage_backward_input([forward(x)], [weight], [x], experts.parameters())
    assert all(parameter.grad is None for parameter in experts.parameters())
    stage_backward_weight(experts.parameters(), later)
    close([input_gradient, *(parameter.grad for parameter in experts.parameters())], wanted)


def test_gelu_is_the_tanh_approximation_that_dense_layers_use(build, randn):
    experts, x = build("gelu"), randn(4, 6, 32)
    dense = torch.stack([F.gelu(x[i] @ experts.up[i], approximate="tanh") @ experts.down[i] for i in range(4)])
    torch.testing.assert_close(experts(x), dense, rtol=1e-12, atol=1e-12)
