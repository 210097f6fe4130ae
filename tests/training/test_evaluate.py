"""The held-out loss: every layout's is one process's, and it is the average weights' own."""

import logging

import pytest
import torch

from megadit.diffusion.objective import velocity_loss
from megadit.training.evaluate import heldout_loss, sample_pictures
from megadit.training.loop import draw_pictures
from megadit.training.step import prepare
from tests.ranks import run_ranks
from tests.training.assembled import assembled, make_step

CLASSES = ["model.conditioning=class", "model.classes=10"]
CONDITIONS = {"text": [], "class": CLASSES}
LAYOUTS = {
    "data2": (2, []),
    "pipeline2": (2, ["parallel.pipeline=2"]),
    "tensor2": (2, ["parallel.tensor=2"]),
}


def trained(rank, world_size, overrides):
    """A run after two steps: before them the head is zero, and all weights predict alike."""
    large = ["data.global_batch=64", "data.micro_batch=16"]  # fewer forward passes over the held-out split
    run = assembled(rank, world_size, "optim.lr=0.02", *large, *overrides)
    for step in (1, 2):
        make_step(run, step)
    return run


def after_training(rank, world_size, overrides):
    return heldout_loss(trained(rank, world_size, overrides))


def pictures_of(rank, world_size, overrides):
    """What is drawn along the way, after some training."""
    return sample_pictures(trained(rank, world_size, overrides)).numpy()


def by_hand(rank, world_size, overrides):
    """The held-out loss; the same by the bare model over the samples that count; how many count, and how many not."""
    run = trained(rank, world_size, ["data.global_batch=200", "data.micro_batch=50", *overrides])
    losses, filling = [], 0
    (network,) = run.stages
    with torch.no_grad(), run.ema.swapped_in():
        for batch, weight_B in run.heldout_loader.heldout():
            noisy, target, keywords = prepare(run, batch, 0, caption_dropout=0.0)
            losses += velocity_loss(network(noisy, **keywords), target)[weight_B > 0].tolist()
            filling += int((weight_B == 0).sum())
    return heldout_loss(run), sum(losses) / len(losses), len(losses), filling


def test_pictures_along_the_way_are_shifted_as_training_is():
    """16 tokens are four times as many as the shift is meant for."""
    few, same = ["sample.steps=2", "log.samples=2"], "objective.shift=2"
    settings = (["objective.shift_tokens=4", "sample.shift=1.5"], [same, "sample.shift=3"], [same, "sample.shift=1.5"])
    shifted, by_hand, plain = (run_ranks(pictures_of, 1, [*few, *overrides])[0] for overrides in settings)
    assert (shifted == by_hand).all() and (shifted != plain).any()


def perturbed(rank, world_size):
    """The held-out loss and pictures as they are, with other raw weights, and with other averages."""
    run = trained(rank, world_size, ["sample.steps=1", "log.samples=2"])
    found = [(heldout_loss(run), sample_pictures(run).numpy())]
    for tensors in ([parameter.data for _, parameter in run.named], [f.flat for f in run.ema.averages]):
        for tensor in tensors:
            tensor.mul_(1.5).add_(0.01)
        found.append((heldout_loss(run), sample_pictures(run).numpy()))
    return found


def spoilt(rank, world_size, folder):
    """What a course says, and leaves behind, that is to draw with averages that are no numbers."""
    run = assembled(rank, world_size, f"run.dir={folder}", "log.samples=2", "sample.steps=1")
    for flat in run.ema.averages:
        flat.flat.fill_(float("nan"))
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megadit").addHandler(handler)
    try:
        draw_pictures(run, 7)
    finally:
        logging.getLogger("megadit").removeHandler(handler)
    return said


def test_a_training_does_not_end_over_pictures_that_are_not_finite(tmp_path):
    ((said,),) = run_ranks(spoilt, 1, tmp_path / "run")
    assert said.startswith("no pictures of step 7: of 2 pictures 2 are not finite, from step 1 of 1 on")
    assert not (tmp_path / "run/samples").exists()


@pytest.fixture(scope="module")
def oracles():
    return {name: run_ranks(after_training, 1, overrides)[0] for name, overrides in CONDITIONS.items()}


def test_told_classes_it_is_another_loss(oracles):
    assert abs(oracles["text"] - oracles["class"]) > 1e-6


@pytest.mark.parametrize("conditioning", CONDITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_loss_of_one_process(layout, conditioning, oracles):
    world_size, overrides = LAYOUTS[layout]
    losses = run_ranks(after_training, world_size, [*overrides, *CONDITIONS[conditioning]])
    assert losses == pytest.approx([oracles[conditioning]] * world_size, rel=1e-9, abs=0)


# Six pictures are no whole number of groups of four, and a pipeline cuts the groups that they fill.
@pytest.mark.parametrize("conditioning", CONDITIONS)
def test_every_layout_draws_the_pictures_of_one_process_also_in_groups(conditioning):
    overrides = ["model.routing_group=batch", "data.micro_batch=4", "sample.steps=2", "log.samples=6"]
    overrides += CONDITIONS[conditioning]
    (expected,) = run_ranks(pictures_of, 1, overrides)
    assert expected.shape == (6, 1, 8, 8)
    for pictures in run_ranks(pictures_of, 2, [*overrides, "parallel.pipeline=2"]):
        torch.testing.assert_close(torch.from_numpy(pictures), torch.from_numpy(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("conditioning", CONDITIONS)
def test_it_is_the_mean_over_the_whole_split(conditioning):
    ((loss, expected, count, filling),) = run_ranks(by_hand, 1, CONDITIONS[conditioning])
    assert (count, filling) == (359, 41), "the last batch must be filled up to show something"
    assert loss == pytest.approx(expected, rel=1e-12, abs=0)


def test_loss_and_pictures_are_the_averages_not_the_weights():
    ((before, other_weights, other_averages),) = run_ranks(perturbed, 1)
    assert other_weights[0] == before[0]
    assert (other_weights[1] == before[1]).all()
    assert abs(other_averages[0] - before[0]) > 1e-6
    assert (other_averages[1] != before[1]).any()
