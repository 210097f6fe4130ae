"""run.compile=true makes one graph of each kind of block for each size of images, and no more in later epochs."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from megadit.model.block import Block
from megadit.training.config import load_config
from megadit.training.step import prepare
from tests.parity.mixed import OVERRIDES, SIZES, start
from tests.parity.training import CONFIG
from tests.ranks import run_ranks
from tests.training.assembled import make_step

STEPS = 2 * len(SIZES)
SMALL = ("model.layers=4", "data.global_batch=4")
KINDS = 2  # of blocks: dense, and with experts
SEEN = {False: {8, 12}, True: {16, 24}}  # how many tokens the blocks see of an image, of half of it and of all


def graphs(rank, world_size, overrides):
    """How many graphs there are after each training step, and then after each batch of two evaluations."""
    counter, compiled = CompileCounterWithBackend("eager"), nn.Module.compile
    # As `build_stages` compiles, but for the backend.
    Block.compile = lambda self, **options: compiled(self, backend=counter, **options)
    run, counts = start(rank, world_size, ("run.compile=true", *SMALL, *overrides)), []
    for step in range(1, STEPS + 1):
        make_step(run, step)
        counts.append(counter.frame_count)
    for step in [*range(1, len(SIZES) + 1)] * 2:
        noisy, _, keywords = prepare(run, run.loader.batch(step), 0, caption_dropout=0.0)
        run.pipeline.forward(noisy, keywords, run.pipeline.num_microbatches)
        counts.append(counter.frame_count)
    return counts


WHOLE = ("model.positions=sincos", "objective.keep_tokens=1")


@pytest.mark.parametrize("overrides", [(), pytest.param(WHOLE, marks=pytest.mark.drill)], ids=["part", "whole"])
def test_each_kind_of_block_has_one_graph_for_each_size(overrides):
    """Blocks know of a size only how many tokens it has, so that two sizes of as many share one."""
    config = load_config(CONFIG, (*OVERRIDES, *overrides))
    training, evaluating = SEEN[config.objective.keep_tokens == 1], SEEN[True]
    (counts,) = run_ranks(graphs, 1, overrides)
    assert counts[0] == KINDS
    assert counts[len(SIZES) - 1 : STEPS] == [KINDS * len(training)] * (STEPS - len(SIZES) + 1)
    # Without gradients a graph is another one.
    assert counts[STEPS + len(SIZES) - 1 :] == [KINDS * (len(training) + len(evaluating))] * (len(SIZES) + 1)
    assert torch.tensor(counts).diff().max() <= KINDS
