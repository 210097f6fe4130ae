"""The held-out loss by time: every layout's is one process's, and it is what the network itself says."""

import json
import shutil

import numpy as np
import pytest
import torch

from megadit.data.encoded import EncodedLoader
from megadit.data.loader import open_dataset
from megadit.data.stored import StoredCaptions
from megadit.diffusion.config import ObjectiveConfig
from megadit.diffusion.timesteps import logit_normal
from megadit.encoders.condition import Captions, Labels
from megadit.evaluation.heldout import (
    check_finite,
    check_plots,
    losses_by_bin,
    noised,
    summarise,
    table,
    times_below,
    to_dict,
)
from megadit.evaluation.heldout_split import heldout_prompts, open_share
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.launch import Process
from megadit.training.config import load_config
from megadit.training.encoded import open_mixture
from megadit.training.restore import open_sampler
from tests.conversion.made import make_run
from tests.data.encoded_sets import write_set
from tests.ranks import run_ranks, train_on
from tests.tiers import slow_but
from tests.training.test_encoded import SHARDS, SIZES

BINS = 3
LAYOUTS = {
    "data2": (2, ParallelConfig()),
    "pipeline2": (2, ParallelConfig(pipeline=2)),
    "tensor2 x expert2": (4, ParallelConfig(tensor=2, expert=2)),
}
GROUPS = ["model.routing_group=batch", "data.micro_batch=4", "model.conditioning=class", "model.classes=10"]
RUNS = {"digits": [], "groups of four, classes": GROUPS, "encoded": ["shards"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs after two large steps: before them the head is zero, and all networks predict alike."""
    root = tmp_path_factory.mktemp("heldout")
    write_set(root / "set", SIZES)
    few = ["run.steps=2", "optim.lr=0.02", "optim.warmup=1"]
    for name, overrides in RUNS.items():
        if overrides == ["shards"]:
            overrides = [*SHARDS, "text.kind=precomputed", f"data.path={root / 'set'}"]
        statuses = train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={root / name}", *few, *overrides)
        assert statuses[0][0] == 0, statuses
    return root


def losses_of(rank, world_size, folder, parallel, batch=16, seed=0, reads_prompts=True):
    here = Process(rank, world_size, rank, torch.device("cpu"))
    sampler = open_sampler(folder, here, parallel, reads_prompts=reads_prompts)
    return losses_by_bin(sampler, open_share(folder, sampler, batch), BINS, seed)


@pytest.fixture(scope="module")
def oracles(trained):
    return {name: run_ranks(losses_of, 1, trained / name, None)[0] for name in RUNS}


@pytest.mark.parametrize("name", slow_but(["groups of four, classes"], RUNS))
@pytest.mark.parametrize("layout", slow_but({"tensor2 x expert2"}, LAYOUTS))
def test_every_layout_has_the_losses_of_one_process(layout, name, trained, oracles):
    world_size, parallel = LAYOUTS[layout]
    for losses in run_ranks(losses_of, world_size, trained / name, parallel, 8):
        np.testing.assert_allclose(losses, oracles[name], rtol=1e-9, atol=0)


def test_every_image_is_in_every_bin(oracles):
    assert oracles["digits"].shape == (BINS, 359)
    # One in eight of each bucket of 40, 24 and 17, but one at least.
    assert oracles["encoded"].shape == (BINS, 5 + 3 + 2)
    for losses in oracles.values():
        assert np.isfinite(losses).all() and len(np.unique(losses)) == losses.size


def test_states_of_an_encoder_are_read_without_it(trained, oracles, tmp_path):
    """As one that is trained with text.kind=t5 has no need of the encoder."""
    folder = shutil.copytree(trained / "encoded", tmp_path / "run")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("kind: precomputed", "kind: t5"))
    for losses in run_ranks(losses_of, 2, folder, None, 16, 0, False):
        np.testing.assert_allclose(losses, oracles["encoded"], rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="text.t5 in .*config.yaml may name what reads the prompts"):
        run_ranks(losses_of, 1, folder, None)


def test_it_repeats_and_another_seed_is_other_noise(trained, oracles):
    for seed in (0, 1):
        (again,) = run_ranks(losses_of, 1, trained / "digits", None, 16, seed)
        assert (again == oracles["digits"]).all() == (seed == 0)


def by_hand(rank, world_size, folder, number):
    """The losses of the first images in pass `number`, one by one, by the bare network."""
    sampler = open_sampler(folder, Process(rank, world_size, rank, torch.device("cpu")))
    dataset, (network,) = open_dataset(sampler.config.data, "heldout"), sampler.pipeline.stages
    batch, _ = next(open_share(folder, sampler).batches())
    assert torch.equal(batch.latents_BCHW, dataset.images(torch.arange(16)))
    noisy, target, times = noised(batch, 0, number, BINS)
    told = {key: value[:, :] for key, value in batch.condition.items()}
    found = []
    with torch.no_grad():
        for i in range(16):
            one = {key: value[i : i + 1] for key, value in told.items()}
            predicted = network(noisy[i : i + 1], timesteps_B=times[i : i + 1], size=(8, 8), **one)
            found.append(float((predicted - target[i]).square().mean()))
    clean = noisy - times.view(-1, 1, 1, 1) * target  # back along the line, at velocity noise - image
    assert torch.allclose(clean, batch.latents_BCHW.double(), atol=1e-12)
    return found, times.numpy()


def test_a_loss_is_the_networks_own_at_a_time_within_its_bin(trained, oracles):
    for number in range(BINS):
        ((found, times),) = run_ranks(by_hand, 1, trained / "digits", number)
        rows = [(i + number) % BINS for i in range(16)]
        assert [int(t * BINS) for t in times] == rows
        np.testing.assert_allclose(oracles["digits"][rows, range(16)], found, rtol=1e-9)


def test_means_and_errors_are_numpys():
    losses = np.random.default_rng(0).random((4, 50))
    bins = summarise(losses, ObjectiveConfig())
    for b, one in enumerate(bins):
        assert (one.begin, one.end, one.count) == (b / 4, (b + 1) / 4, 50)
        assert one.loss == pytest.approx(losses[b].mean(), rel=1e-12)
        assert one.error == pytest.approx(losses[b].std(ddof=1) / 50**0.5, rel=1e-12)
    found = to_dict(bins)
    assert found["loss_uniform"] == pytest.approx(losses.mean(), rel=1e-12)
    assert sum(one.trained for one in bins) == pytest.approx(1)
    assert json.loads(json.dumps(found)) == found
    assert len(table(bins)) == 6 and "0.25 - 0.50" in table(bins)[2]


def test_the_error_of_one_image_is_not_known():
    bins = summarise(np.ones((2, 1)), ObjectiveConfig())
    found = to_dict(bins)
    assert [one["error"] for one in found["bins"]] == [None, None] and found["loss_uniform"] == 1
    json.dumps(found, allow_nan=False)


def test_losses_that_are_not_finite_are_refused_by_checkpoint():
    losses = np.ones((3, 4))
    check_finite(losses, "runs/x, step 7")
    losses[1, 2], losses[0, 3] = np.nan, np.inf
    with pytest.raises(ValueError, match="runs/x, step 7: the held-out loss is not finite, of image 2 for one"):
        check_finite(losses, "runs/x, step 7")


def test_a_plot_without_matplotlib_is_refused(monkeypatch):
    check_plots()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the plot needs matplotlib: .*, or leave --plot out"):
        check_plots()


def test_all_times_may_be_one():
    objective = ObjectiveConfig(logit_mean=0.0, logit_std=0.0)
    assert [times_below(t, objective) for t in (0.0, 0.4, 0.6, 1.0)] == [0, 0, 1, 1]
    bins = summarise(np.ones((3, 2)), objective)
    assert [one.trained for one in bins] == [0, 1, 0]


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(logit_mean=0.5, logit_std=0.7, shift=3.0)])
def test_times_as_trained_are_those_that_a_training_draws(objective):
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = logit_normal(normal, objective.logit_mean, objective.logit_std, objective.shift)
    for t in (0.1, 0.5, 0.9):
        assert times_below(t, objective) == pytest.approx(float((drawn < t).double().mean()), abs=4e-3)
    assert (times_below(0.0, objective), times_below(1.0, objective)) == (0.0, 1.0)


def heldout_of(run):
    """(the mixture of a run, the numbers of its held-out samples, each once, and their classes)."""
    config = load_config(run / "config.yaml")
    mixture = open_mixture(config)
    numbers, labels = [], []
    for batch, weight_B in EncodedLoader(mixture, 0, 0, 1).heldout():
        kept = weight_B > 0
        numbers += batch.latents_BCHW[kept, 0, 0, 0].int().tolist()
        labels += batch.condition["labels_B"][kept].tolist() if "labels_B" in batch.condition else []
    return mixture, numbers, labels


def test_prompts_are_of_the_held_out_images_of_every_bucket(trained):
    mixture, numbers, _ = heldout_of(trained / "encoded")
    condition = StoredCaptions(mixture)
    prompts = heldout_prompts(trained / "encoded", condition)
    told = condition.encode(prompts)["text_states_BLC"][:, 0, 0].int().tolist()
    assert sorted(told) == sorted(numbers) and len(set(told)) == 5 + 3 + 2
    few = heldout_prompts(trained / "encoded", condition, 4)
    told = condition.encode(few)["text_states_BLC"][:, 0, 0].int().tolist()
    assert len(set(told)) == 4 and {number // 40 for number in told} == {0, 1}, "of several buckets"
    assert heldout_prompts(trained / "encoded", condition, 12) == [*prompts, *prompts[:2]]
    with pytest.raises(ValueError, match="does not hold its captions as text; say what to draw with --prompts"):
        heldout_prompts(trained / "encoded", Captions.__new__(Captions))


def test_classes_are_those_of_the_held_out_images(tmp_path):
    write_set(tmp_path / "set", SIZES, captions=0, classes=7)
    shards = ["data.kind=shards", f"data.path={tmp_path / 'set'}", "data.heldout=8", "data.global_batch=8"]
    latents = ["model.channels=2", "model.patch=1", "model.image_size=4", "model.positions=rotary"]
    make_run(tmp_path / "run", *shards, *latents, "model.conditioning=class", "model.classes=7")
    _, numbers, labels = heldout_of(tmp_path / "run")
    prompts = heldout_prompts(tmp_path / "run", Labels(7))
    assert sorted(map(int, prompts)) == sorted(labels) == sorted(number % 7 for number in numbers)
    assert len(prompts) == 10


def test_prompts_of_a_data_set_in_memory_are_its_held_out_captions(trained):
    prompts = heldout_prompts(trained / "digits", None)
    assert len(prompts) == 359 and heldout_prompts(trained / "digits", None, 361) == [*prompts, *prompts[:2]]
