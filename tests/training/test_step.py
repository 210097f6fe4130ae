"""What is random about a sample is its own, a dropped caption is the empty one, and a step reports itself."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch

from megadit.data.batch import Batch
from megadit.diffusion.objective import corrupt, velocity_loss
from megadit.training.evaluate import heldout_loss
from megadit.training.step import draw, draw_kept, prepare, read, train_step
from tests.ranks import run_ranks
from tests.training.assembled import after, assembled, make_step


def batch_of(ids, size=(8, 8)):
    """A batch of which only the sample ids and the image's shape matter."""
    return Batch(torch.tensor(ids), torch.zeros(len(ids), 1, *size), {"labels_B": torch.zeros(len(ids))})


def drawn(seed, step, ids):
    """{sample id: all that is drawn for it, as one vector}."""
    draws = draw(seed, step, batch_of(ids))
    columns = [draws.noise_BCHW.flatten(1), draws.normal_B[:, None], draws.uniform_B[:, None]]
    return dict(zip(ids, torch.cat(columns, dim=1), strict=True))


@pytest.mark.parametrize("ids", [[7], [7, 3], [3, 900, 7, 0], [0, 900, 3, 7]])
def test_a_sample_draws_the_same_in_every_batch(ids):
    torch.manual_seed(len(ids))  # the global generator has no part in it
    assert torch.equal(drawn(0, 5, ids)[7], drawn(0, 5, [1, 7, 2])[7])


def test_samples_steps_and_seeds_draw_apart():
    vectors = [drawn(seed, step, [id])[id] for seed in (0, 1) for step in (1, 2) for id in (1, 2)]
    for i, one in enumerate(vectors):
        for other in vectors[:i]:
            assert not (one == other).any()


def test_draws_have_the_right_distributions():
    draws = draw(0, 1, batch_of(list(range(2000))))
    for normal, count in ((draws.noise_BCHW, 2000 * 64), (draws.normal_B, 2000)):
        assert abs(normal.mean()) < 5 / math.sqrt(count)
        assert abs(normal.var() - 1) < 5 * math.sqrt(2 / count)
    assert draws.uniform_B.min() >= 0
    assert draws.uniform_B.max() < 1
    assert abs(draws.uniform_B.mean() - 0.5) < 5 / math.sqrt(12 * 2000)


def prepared(rank, world_size, overrides, dropout):
    """{keyword: (of the batch, as prepared, of a sample that is told nothing)}, and what decides who is dropped."""
    run = assembled(rank, world_size, *overrides)
    batch = run.loader.batch(1)
    keywords, nothing = prepare(run, batch, 1, dropout)[2], run.inputs.condition.nothing
    told = {
        key: [tensor.numpy() for tensor in (value, keywords.pop(key), nothing[key])]
        for key, value in batch.condition.items()
    }
    assert keywords.keys() == {"timesteps_B", "size"}
    return told, draw(run.config.run.seed, 1, batch).uniform_B.numpy()


CONDITIONS = {
    "text": ([], {"text_ids_BL", "text_mask_BL"}),
    "class": (["model.conditioning=class", "model.classes=10"], {"labels_B"}),
}


@pytest.mark.parametrize("conditioning", CONDITIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_a_dropped_caption_or_class_is_replaced_by_nothing(dropout, conditioning):
    overrides, keys = CONDITIONS[conditioning]
    ((told, uniform),) = run_ranks(prepared, 1, overrides, dropout)
    dropped = uniform < dropout
    assert (dropped.any(), dropped.all()) == (dropout > 0, dropout == 1), "shows nothing"
    assert told.keys() == keys
    for given, shown, nothing in told.values():
        assert (shown[~dropped] == given[~dropped]).all()
        assert (shown[dropped] == nothing).all()
        assert (given != nothing).any(), "shows nothing"


def times_of(rank, world_size, size, overrides):
    """The times of a batch of images of this size, and the normal numbers that they are made of."""
    run, batch = assembled(rank, world_size, *overrides), batch_of([3, 7, 11], size)
    run = replace(run, inputs=replace(run.inputs, condition=SimpleNamespace(nothing={"labels_B": torch.zeros(1)})))
    keywords = prepare(run, batch, 1, 0.0)[2]
    assert keywords["size"] == size
    return keywords["timesteps_B"].numpy(), draw(run.config.run.seed, 1, batch).normal_B.numpy()


@pytest.mark.parametrize(("shift_tokens", "size", "shift"), [(0, (16, 4), 3.0), (4, (8, 8), 6.0), (64, (16, 4), 1.5)])
def test_times_shift_with_the_number_of_tokens(shift_tokens, size, shift):
    overrides = [f"objective.shift_tokens={shift_tokens}", "objective.shift=3"]
    ((times, normal),) = run_ranks(times_of, 1, size, overrides)
    odds = shift * numpy.exp(normal)
    assert times == pytest.approx(odds / (1 + odds), rel=1e-12)


def test_each_sample_draws_which_tokens_are_kept_from_its_own_stream():
    """So many, each place at most once, in order; others in another step, for another seed and sample."""
    kept = draw_kept(0, 5, [7, 3, 900], 24, 9)
    assert kept.shape == (3, 9) and kept.dtype == torch.int64
    assert ((kept[:, 1:] > kept[:, :-1]).all(), kept.min() >= 0, kept.max() < 24) == (True, True, True)
    assert torch.equal(draw_kept(0, 5, [1, 900, 2], 24, 9)[1], kept[2])
    others = [draw_kept(*key, 24, 9)[0] for key in ((0, 5, [3]), (0, 6, [7]), (1, 5, [7]))]
    assert not any(torch.equal(kept[0], other) for other in others)
    # All places alike: 200 of 256 tokens, of 500 samples.
    counts = draw_kept(0, 1, range(500), 256, 200).flatten().bincount(minlength=256).double()
    share = 200 / 256
    assert (counts - 500 * share).abs().max() < 5 * math.sqrt(500 * share * (1 - share))


def kept_step(rank, world_size, overrides):
    """A step that sees a part: (its loss, by hand from the whole image's target; the tokens and the statistics)."""
    run = assembled(rank, world_size, *overrides)
    batch, network, objective = run.loader.batch(1), run.stages[0], run.config.objective
    keep = objective.keep_tokens
    noisy, target, keywords = prepare(run, batch, 1, objective.caption_dropout, keep)
    whole_noisy, whole_target, whole_keywords = prepare(run, batch, 1, objective.caption_dropout)
    assert torch.equal(noisy, whole_noisy) and "kept_BT" not in whole_keywords
    places = keywords["kept_BT"]
    with torch.no_grad():
        network.head.linear.weight.add_(0.1)
        velocity = network(noisy, **keywords)
    losses = []
    for image, of_image, seen in zip(whole_target, velocity, places, strict=True):
        pixels = [image[:, 2 * (t // 4) : 2 * (t // 4) + 2, 2 * (t % 4) : 2 * (t % 4) + 2].flatten() for t in seen]
        losses.append((torch.stack(pixels) - of_image).square().mean().item())
    outcome = train_step(run, after(0))
    (report,) = read(run, [outcome.unread])
    return report.loss, sum(losses) / len(losses), outcome.tokens, report.routing, heldout_loss(run)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_the_loss_is_the_mean_over_the_pixels_that_are_seen(positions):
    """Seven of 16 tokens, of which each of four experts takes ceil(7 x 2 / 4); the held-out loss sees them all."""
    overrides = ["objective.keep_tokens=0.44", f"model.positions={positions}", "optim.lr=0"]
    ((loss, by_hand, tokens, routing, heldout),) = run_ranks(kept_step, 1, overrides)
    assert loss == pytest.approx(by_hand, rel=1e-12)
    assert tokens == 7
    assert all(stats["picks"] == pytest.approx(4 * 4 / 7) for stats in routing.values())
    ((*_, whole_heldout),) = run_ranks(kept_step, 1, [*overrides, "objective.keep_tokens=0.5"])
    assert heldout == whole_heldout


def one_step(rank, world_size, overrides):
    """Step 1: its report, its loss and gradient norm by hand, the largest change, whether gradients are cleared."""
    run = assembled(rank, world_size, *overrides)
    batch = run.loader.batch(1)
    draws = draw(run.config.run.seed, 1, batch)
    noisy, target = corrupt(batch.latents_BCHW, draws.noise_BCHW, torch.sigmoid(draws.normal_B))
    keywords = prepare(run, batch, 1, run.config.objective.caption_dropout)[2]
    loss = velocity_loss(run.stages[0](noisy.double(), **keywords), target.double()).mean()
    gradients = torch.autograd.grad(loss, run.stages[0].parameters())
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    before = [parameter.detach().clone() for parameter in run.stages[0].parameters()]
    (report,) = read(run, [make_step(run, 1)])
    largest = max((p - b).abs().max().item() for p, b in zip(run.stages[0].parameters(), before, strict=True))
    cleared = all(parameter.grad is None for parameter in run.stages[0].parameters())
    return report, loss.item(), norm.item(), largest, cleared


def test_a_step_reports_the_mean_loss_and_the_norm_before_clipping():
    overrides = ["optim.weight_decay=0", "optim.clip=0.1"]
    ((report, loss, norm, largest, cleared),) = run_ranks(one_step, 1, overrides)
    assert report.step == 1
    assert report.loss == pytest.approx(loss, rel=1e-12)
    assert report.grad_norm == pytest.approx(norm, rel=1e-12)
    assert report.grad_norm > 0.1, "nothing was clipped"
    assert report.lr == 3e-3 / 2, "the first of two steps of warm-up"
    # Adam's first step moves each weight by at most the rate, whatever the gradient's scale.
    assert 0.9 * report.lr < largest <= report.lr
    assert cleared


def averaged_step(rank, world_size):
    run = assembled(rank, world_size)
    before = {name: parameter.detach().clone() for name, parameter in run.named}
    make_step(run, 1)
    averages = {average.name: average.flat for average in run.ema.averages}
    for name, parameter in run.named:  # the first average keeps a tenth of the start
        expected = 0.1 * before[name] + 0.9 * parameter.detach()
        torch.testing.assert_close(averages[name].view_as(parameter), expected, rtol=1e-12, atol=1e-15)


def test_a_step_averages_the_weights_that_it_leaves():
    run_ranks(averaged_step, 1)


def reported(rank, world_size, overrides):
    run = assembled(rank, world_size, *overrides)
    outcomes = [train_step(run, after(step)) for step in (0, 1)]
    reports = read(run, [outcome.unread for outcome in outcomes])
    for outcome, report in zip(outcomes, reports, strict=True):  # what the host knows at once is what is read later
        assert (outcome.loss, outcome.grad_norm) == pytest.approx((report.loss, report.grad_norm), rel=1e-12, abs=0)
    return reports


TOKEN_CHOICE = ["model.routing=token_choice", "model.balance_loss=0.1"]


@pytest.mark.parametrize("overrides", [[], TOKEN_CHOICE, [*TOKEN_CHOICE, "model.dropless=true"]])
def test_a_step_reports_the_routing_of_every_moe_layer(overrides):
    ((report, _),) = run_ranks(reported, 1, overrides)
    assert report.routing.keys() == {1, 3}
    for stats in report.routing.values():
        assert set(stats) - {"load"} == {"picks", "unpicked", "busiest", "entropy"}
        assert 0 < stats["picks"] <= stats["busiest"] <= 4
        assert 0 <= stats["unpicked"] < 1
        assert 0 < stats["entropy"] <= 1
        if overrides:
            assert len(stats["load"]) == 4
            assert sum(stats["load"]) == pytest.approx(4)
        else:
            assert stats["picks"] == 2 and "load" not in stats


def test_a_dense_model_reports_no_routing():
    ((dense, _),) = run_ranks(reported, 1, ["model.experts=0"])
    assert dense.routing == {}


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(2, []), (2, ["parallel.pipeline=2"]), (4, ["parallel.tensor=2", "parallel.expert=2"])],
    ids=["data2", "pipeline2", "tensor2_expert2"],
)
@pytest.mark.parametrize("model", [[], TOKEN_CHOICE], ids=["expert_choice", "token_choice"])
def test_every_rank_reports_what_one_process_reports(world_size, overrides, model):
    (oracle,) = run_ranks(reported, 1, model)
    first, *others = run_ranks(reported, world_size, [*model, *overrides])
    assert others == [first] * (world_size - 1)
    for found, expected in zip(first, oracle, strict=True):
        assert (found.loss, found.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-9, abs=0)
        assert found.routing.keys() == expected.routing.keys() == {1, 3}
        for layer, stats in expected.routing.items():  # of all microbatches: they are cut otherwise here
            for name, value in stats.items():
                assert found.routing[layer][name] == pytest.approx(value, rel=1e-9, abs=1e-12), (layer, name)
