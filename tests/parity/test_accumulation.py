"""Gradients of many microbatches add up in float32, whatever the schedule, though each of them is bf16."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.training.assembled import assembled

MICROBATCHES = 64
SETTINGS = ("run.dtype=bfloat16", "zero.stage=1", f"data.global_batch={2 * MICROBATCHES}", "data.micro_batch=2")


def added_up(rank, world_size, overrides):
    """Per parameter: how many gradients came, whether all were bf16, and how far their float32 sum and their bf16 sum
    are from what the engine holds."""
    from megadit.training.step import prepare

    run = assembled(rank, world_size, *SETTINGS, *overrides)
    seen = {name: [] for name, _ in run.named}
    accumulate = run.pipeline.after_backward

    def record():
        for name, parameter in run.named:
            if parameter.grad is not None:
                seen[name].append(parameter.grad.clone())
        accumulate()

    run.pipeline.after_backward = record
    noisy, target, keywords = prepare(run, run.loader.batch(1), 1, caption_dropout=0.1)
    run.pipeline.train(noisy, target, keywords)
    found = {}
    for name, parameter in run.named:
        exact = torch.zeros_like(parameter, dtype=torch.float32)
        rounded = torch.zeros_like(parameter)
        for gradient in seen[name]:
            exact += gradient.float()
            rounded += gradient
        held = parameter.grad_accum
        kinds = {gradient.dtype for gradient in seen[name]}
        found[name] = (
            len(seen[name]),
            kinds == {torch.bfloat16},
            held.dtype == torch.float32 and torch.equal(held, exact),
            float((rounded.float() - exact).norm() / exact.norm().clamp_min(1e-30)),
        )
    return found


@pytest.mark.parametrize("schedule", slow_but(["zbv"], ["1f1b", "interleaved", "zbv"]))
def test_the_accumulator_is_the_float32_sum_of_bf16_gradients(schedule):
    ranks = run_ranks(added_up, 2, ["parallel.pipeline=2", f"parallel.schedule={schedule}"])
    everything = {name: found for rank in ranks for name, found in rank.items()}
    assert {name.split(".")[1] for name in everything if name.startswith("blocks.")} == {"0", "1", "2", "3"}
    for name, (count, were_bf16, is_exact, _) in everything.items():
        assert (name, count, were_bf16, is_exact) == (name, MICROBATCHES, True, True)
    # A sum in bf16 would have been another: the test would see it.
    assert max(lost for *_, lost in everything.values()) > 1e-3
