"""The pipeline: stages on two ranks compute and differentiate what the whole network does on one."""

import pytest
import torch
from torch import nn

from megadit.parallel.grid import Grid, Group, Layout
from megadit.parallel.pipeline.partition import partition, stage_indices
from megadit.parallel.pipeline.schedule import SCHEDULES, Pipeline
from tests.ranks import run_ranks

MICROBATCHES = 4


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network(nn.Module):
    """Some of four layers; hands on two tensors and is told two things by keyword."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): nn.Linear(5, 5).double() for layer in layers})
        with torch.no_grad():
            for layer, linear in self.layers.items():
                linear.weight.copy_(numbers(int(layer), 5, 5))
                linear.bias.copy_(numbers(10 + int(layer), 5))

    def forward(self, x, origin=None, *, scale, power):
        origin = x if origin is None else origin
        for linear in self.layers.values():
            x = (linear(x) * scale[:, None]).sin() + x
        return x + origin**power if "3" in self.layers else (x.contiguous(), origin.contiguous())


def loss_of(output, target):
    return (output - target).square().sum()


def keywords_of(samples):
    return {"scale": numbers(3, samples).abs(), "power": 2}


def pipeline_of(rank, world_size, schedule):
    group = Grid(Layout(world_size, 1, 1, 1), rank)["pp"]
    per_rank = 1 if schedule == "1f1b" else 2
    layers = partition([1.0] * 4, world_size * per_rank)
    stages = [Network(layers[index]) for index in stage_indices(schedule, rank, world_size, per_rank)]
    return Pipeline(stages, group, torch.device("cpu"), MICROBATCHES, loss_of, schedule)


def train_several_shapes(rank, world_size, schedule):
    """Each shape twice and interleaved; gradients add up over calls, as over microbatches."""
    pipeline, whole = pipeline_of(rank, world_size, schedule), Network(range(4))
    for samples in (4, 8, 4, 12, 8):
        batch, target, keywords = numbers(4, samples, 5), numbers(5, samples, 5), keywords_of(samples)
        total = pipeline.train(batch, target, keywords)
        expected = loss_of(whole(batch, **keywords), target)
        expected.backward()
        shown = expected.detach() if pipeline.is_last else torch.zeros_like(expected)
        torch.testing.assert_close(total, shown, rtol=1e-12, atol=0)
        assert not total.requires_grad
        layers = {layer: linear for stage in pipeline.stages for layer, linear in stage.layers.items()}
        for layer, linear in layers.items():
            for name, parameter in linear.named_parameters():
                grad = getattr(whole.layers[layer], name).grad
                torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_microbatches_of_several_shapes_in_turn_add_up_to_the_whole_batch(schedule, world_size):
    run_ranks(train_several_shapes, world_size, schedule)


def forward_several_shapes(rank, world_size, schedule):
    pipeline, whole = pipeline_of(rank, world_size, schedule), Network(range(4))
    for samples in (1, 3, 4, 2, 5, 1):
        batch, keywords = numbers(4, samples, 5), keywords_of(samples)
        kept = batch.clone()
        out = pipeline.forward(batch, keywords)
        assert out.shape == batch.shape and not out.requires_grad
        torch.testing.assert_close(out, whole(batch, **keywords).detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(batch, kept)
        assert len(keywords["scale"]) == samples
    assert all(parameter.grad is None for stage in pipeline.stages for parameter in stage.parameters())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rank_gets_the_outputs_of_a_batch_that_does_not_fill_the_stages(schedule, world_size):
    run_ranks(forward_several_shapes, world_size, schedule)


def forward_heard(rank, world_size, schedule):
    """What a listener is told of three batches, and how often each stage ran since the one before."""
    pipeline, told, runs = pipeline_of(rank, world_size, schedule), [], []
    for stage in pipeline.stages:
        stage.register_forward_hook(lambda *_: runs.append(1))

    def listener(batch, keywords, microbatches):
        told.append((batch.tolist(), keywords["scale"].tolist(), microbatches, len(runs) / len(pipeline.stages)))
        runs.clear()

    pipeline.listeners.append(listener)
    for samples in (3, 3, 5):
        pipeline.forward(numbers(4, samples, 5), keywords_of(samples))
    pipeline.listeners.remove(listener)
    pipeline.forward(numbers(4, 3, 5), keywords_of(3))
    return told


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_listener_is_told_of_each_call_and_how_many_runs_of_a_stage_are_its_own(schedule, world_size):
    for told in run_ranks(forward_heard, world_size, schedule):
        assert [len(batch) for batch, *_ in told] == [3, 3, 5]
        for batch, scale, microbatches, _ in told:
            assert batch == numbers(4, len(batch), 5).tolist()
            assert scale == keywords_of(len(batch))["scale"].tolist()
            assert microbatches == world_size
        # Of a new shape there is one run more, before, which is nobody's.
        assert [runs for *_, runs in told] == [world_size + 1, world_size, world_size + 1]


def forward_strided(rank, world_size, schedule):
    pipeline, keywords = pipeline_of(rank, world_size, schedule), keywords_of(4)
    strided = numbers(4, 5, 4).T
    assert not strided.is_contiguous()
    out = pipeline.forward(strided, keywords)
    expected = Network(range(4))(strided, **keywords).detach()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_batch_with_other_strides_gives_the_same_outputs():
    run_ranks(forward_strided, 2, "1f1b")


def test_a_keyword_that_requires_gradients_is_refused():
    pipeline = Pipeline([Network(range(4))], Group(None, 1, 0), torch.device("cpu"), MICROBATCHES, loss_of)
    keywords = keywords_of(4) | {"scale": torch.ones(4, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match="keyword argument scale requires gradients"):
        pipeline.train(numbers(4, 4, 5), numbers(5, 4, 5), keywords)
