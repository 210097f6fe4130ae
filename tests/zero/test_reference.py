"""The oracle against torch's own AdamW and clipping, and its state out and in again."""

import pytest
import torch

from megadit.model.weights import decays
from tests.ranks import run_ranks
from tests.zero.runs import advance, backward, copies, fresh, rate


def against_torch(rank, world_size, overrides):
    run = fresh(rank, world_size, overrides)
    optim, named = run.config.optim, fresh(rank, world_size, overrides).named
    theirs = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if decays(name)], "weight_decay": optim.weight_decay},
            {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
        ],
        betas=optim.betas,
        eps=optim.eps,
    )
    clipped = 0
    for step in range(1, 6):
        backward(run, step)
        for (_, parameter), (_, ours) in zip(named, run.named, strict=True):
            parameter.grad = ours.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], optim.clip)
        for group in theirs.param_groups:
            group["lr"] = rate(step)
        theirs.step()
        run.engine.reduce_gradients()
        norm = run.engine.step(rate(step), torch.zeros(())).norm
        clipped += float(norm) > optim.clip
        torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
        for (name, parameter), (_, ours) in zip(named, run.named, strict=True):
            assert (parameter - ours).abs().max() <= 1e-12, (step, name)
            assert ours.grad is None
    return clipped


@pytest.mark.parametrize(("clip", "clipped"), [(0.05, 5), (1e6, 0)])
def test_five_steps_are_torchs_adamw_after_clipping(clip, clipped):
    overrides = [f"optim.clip={clip}", "optim.weight_decay=0.3"]
    assert run_ranks(against_torch, 1, overrides) == [clipped]


def stopped_and_restored(rank, world_size):
    run = fresh(rank, world_size, [])
    advance(run, range(1, 4))
    state = {(f.name, f.kind): f.flat.clone() for f in run.engine.fragments()}
    weights = copies(run)
    assert state.keys() == {(name, kind) for name, _ in run.named for kind in ("exp_avg", "exp_avg_sq")}
    expected_norms, expected = advance(run, (4, 5)), copies(run)

    other = fresh(rank, world_size, [], seed=2)
    for fragment in other.engine.fragments():
        assert (fragment.start, fragment.sharded) == (0, ())
        fragment.flat.copy_(state[fragment.name, fragment.kind])
    with torch.no_grad():
        for name, parameter in other.named:
            parameter.copy_(weights[name])
    other.engine.restored(3)
    assert advance(other, (4, 5)) == expected_norms
    for name, parameter in other.named:
        assert torch.equal(parameter, expected[name]), name


def test_restored_state_goes_on_bit_for_bit():
    run_ranks(stopped_and_restored, 1)
