"""A run is assembled alike in every layout: the same weights, the samples that are its share."""

import pytest
import torch

from megadit.parallel.placement import placement_of
from megadit.training.build import mean_over
from tests.ranks import run_ranks
from tests.training.assembled import assembled

LAYOUTS = {
    "tensor2_expert2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "pipeline2_data2": (4, ["parallel.pipeline=2"]),
    "tensor2_sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "recompute": (1, ["run.recompute=block"]),
}


def built(rank, world_size, overrides):
    """{name: (offsets, this rank's part)}, what its first batch shows, and its number of microbatches."""
    run = assembled(rank, world_size, "zero.stage=0", *overrides)
    parts = {
        name: (placement_of(parameter).offsets(parameter.shape, run.grid), parameter.detach().numpy())
        for name, parameter in run.named
    }
    shown = [image.sum().item() for image in run.loader.batch(1).latents_BCHW]
    return parts, shown, run.pipeline.num_microbatches


@pytest.fixture(scope="module")
def one():
    return run_ranks(built, 1, [])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_from_bitwise_equal_weights(layout, one):
    world_size, overrides = LAYOUTS[layout]
    names = set()
    for parts, _, _ in run_ranks(built, world_size, overrides):
        for name, (offsets, part) in parts.items():
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape, strict=True))
            assert one[0][name][1][place].tobytes() == part.tobytes(), name
        names |= parts.keys()
    assert names == one[0].keys()


def test_another_seed_starts_from_other_weights(one):
    ((other, ids, _),) = run_ranks(built, 1, ["run.seed=1"])
    drawn = [name for name, (_, part) in one[0].items() if part.std() > 0]
    assert len(drawn) > 20
    assert not any((other[name][1] == one[0][name][1]).any() for name in drawn)
    assert ids != one[1]


def test_data_parallel_ranks_share_the_batch_and_model_parallel_ranks_repeat_it(one):
    _, whole, _ = one
    results = run_ranks(built, 4, ["parallel.pipeline=2"])  # ranks [pp, dp]
    assert [ids for _, ids, _ in results] == [whole[:8], whole[8:]] * 2
    assert [number for *_, number in results] == [2] * 4
    assert one[2] == 4


def test_the_losses_of_the_microbatches_add_up_to_the_batchs_mean():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 6, 1, 4, 4, generator=generator, dtype=torch.float64)
    balance = torch.rand(6, generator=generator, dtype=torch.float64)  # of each image
    loss, pieces = mean_over(6, balance_weight=0.1), ([0, 1, 2, 3], [4, 5])
    plain = [loss(prediction[part], target[part]) for part in pieces]
    torch.testing.assert_close(sum(plain), (prediction - target).square().mean(), rtol=1e-14, atol=0)
    balanced = [loss((prediction[part], balance[part].sum().view(1)), target[part]) for part in pieces]
    torch.testing.assert_close(sum(balanced), sum(plain) + 0.1 * balance.mean(), rtol=1e-14, atol=0)
