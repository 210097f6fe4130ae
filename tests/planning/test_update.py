"""What the engine does besides collectives, against what torch dispatches in a real step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadit.model.weights import decays
from megadit.parallel.grid import Layout
from megadit.planning.update import update_of
from megadit.zero.footprint import LocalParameter, local_parameters, state_of
from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.zero.runs import backward, fresh


class Dispatched(TorchDispatchMode):
    """Counts kernels, and bytes of their arguments and results."""

    def __init__(self):
        super().__init__()
        self.kernels = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace != "c10d":
            self.kernels += 1
            self.nbytes += sum(tensor.nbytes for tensor in tensors((args, list((kwargs or {}).values()), out)))
        return out


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_2_reduces_after_every_microbatch(stage):
    parameters = [LocalParameter(name, 64, ("edp", "ep"), False, True) for name in ("up", "down")]
    engine = state_of(stage, parameters, torch.float32, Layout(pp=1, edp=4, ep=1, tp=1), 0, 0.01)
    costs = [update_of(engine, microbatches, foreach=True) for microbatches in (1, 2, 3)]
    for one, two, three in zip(*costs, strict=True):
        assert three - two == two - one
        assert (two > one) == (stage == 2)


def step_costs(rank, world_size, overrides):
    """(kernels, bytes) that were dispatched, and that are reckoned, for the second step of a training."""
    run = fresh(rank, world_size, overrides)
    for step in (1, 2):
        backward(run, step)
        with Dispatched() as dispatched:
            run.engine.reduce_gradients()
            run.engine.step(1e-3, torch.zeros(()))
            run.ema.update(step)
    stage, layout = run.config.zero.stage, Layout.of(run.config.parallel, world_size)
    parameters = local_parameters([stage.named_parameters() for stage in run.stages], decays)
    engine = state_of(stage, parameters, run.config.dtype, layout, rank, run.config.optim.weight_decay)
    return (dispatched.kernels, dispatched.nbytes), tuple(update_of(engine, 1, foreach=False))


# Wide enough that its weights outweigh what is counted for each tensor.
WIDE = ["run.dtype=float32", "model.width=256", "data.micro_batch=0"]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("ranks", slow_but([2], [1, 2]))
def test_a_step_dispatches_what_is_reckoned(stage, ranks):
    results = run_ranks(step_costs, ranks, [*WIDE, f"zero.stage={stage}"])
    # Which tensors are in whose part differs: ranks are compared with the mean rank.
    dispatched, reckoned = ([sum(column) for column in zip(*(r[i] for r in results), strict=True)] for i in (0, 1))
    assert reckoned[0] == pytest.approx(dispatched[0], rel=0.1), "kernels"
    assert reckoned[1] == pytest.approx(dispatched[1], rel=0.1), "bytes"
