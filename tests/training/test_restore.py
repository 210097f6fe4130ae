"""A run opened for sampling has the averages that its own ranks had, whatever their layout was."""

import numpy as np
import pytest
import torch

from megadit.data.loader import open_dataset
from megadit.parallel.grid import ParallelConfig
from megadit.parallel.placement import placement_of
from megadit.runtime.launch import Process
from megadit.training.evaluate import sample_pictures
from megadit.training.loop import prepare_directory, save, train
from megadit.training.restore import open_sampler
from tests.ranks import run_ranks
from tests.training.assembled import assembled

STEPS = 3
PROMPTS = ["a handwritten three", "the digit 7", "number one"]


def train_and_draw(rank, world_size, folder):
    """Train; this rank's averages as {name: (offsets, part)}, and the pictures that its ranks draw together."""
    layout = ["parallel.tensor=2", "parallel.expert=2", "run.dtype=float32", "zero.stage=1"]
    run = assembled(rank, world_size, f"run.dir={folder}", f"run.steps={STEPS}", "optim.lr=0.02", *layout)
    prepare_directory(run)
    train(run, 0)
    averages = {
        name: (placement_of(parameter).offsets(parameter.shape, run.grid), run.ema.average[name].numpy())
        for name, parameter in run.named
    }
    return averages, sample_pictures(run).numpy()


def process(rank, world_size):
    return Process(rank, world_size, rank, torch.device("cpu"))


def restored(rank, world_size, folder, parallel):
    """The sampler's step, weights, and pictures of the held-out prompts."""
    sampler = open_sampler(folder, process(rank, world_size), parallel)
    config = sampler.config
    prompts = open_dataset(config.data, "heldout").prompts(config.log.samples)  # as `sample_pictures`
    pictures = sampler.draw(prompts, config.sample, config.run.seed)
    weights = {name: parameter.detach().numpy() for name, parameter in sampler.pipeline.stage.named_parameters()}
    return sampler.step, weights, pictures.numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore") / "run"
    return folder, run_ranks(train_and_draw, 4, folder)


def test_one_process_restores_the_averages_of_four_bitwise(trained):
    folder, results = trained
    ((step, weights, _),) = run_ranks(restored, 1, folder, None)
    assert step == STEPS
    for averages, _ in results:
        assert averages.keys() == weights.keys()
        for name, (offsets, part) in averages.items():
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape, strict=True))
            assert weights[name][place].tobytes() == part.tobytes(), name


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, None), (2, None), *[(2, ParallelConfig(**{axis: 2})) for axis in ("tensor", "pipeline", "expert")]],
)
def test_it_draws_the_pictures_that_the_trained_ranks_drew(world_size, parallel, trained):
    folder, results = trained
    pictures = [drawn for _, drawn in results]
    pictures += [drawn for _, _, drawn in run_ranks(restored, world_size, folder, parallel)]
    for drawn in pictures[1:]:
        np.testing.assert_allclose(drawn, pictures[0], rtol=0, atol=1e-6)


def draw_in_parts(rank, world_size, folder):
    sampler = open_sampler(folder, process(rank, world_size))
    assert sampler.image_shape == (1, 8, 8)
    settings = sampler.config.sample
    whole = sampler.draw(PROMPTS, settings, 5)
    parts = [sampler.draw([prompt], settings, 5, first_index=i) for i, prompt in enumerate(PROMPTS)]
    return whole.numpy(), torch.cat(parts).numpy(), sampler.draw(PROMPTS, settings, 6).numpy()


def test_pictures_drawn_one_by_one_are_those_drawn_together(trained):
    ((whole, parts, other_seed),) = run_ranks(draw_in_parts, 1, trained[0])
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
    assert np.abs(other_seed - whole).mean() > 0.1


def save_twice(rank, world_size, folder):
    run = assembled(rank, world_size, f"run.dir={folder}")
    prepare_directory(run)
    for step in (3, 11):
        save(run, step)


def newest(rank, world_size, folder):
    return open_sampler(folder, process(rank, world_size)).step


def test_the_newest_checkpoint_is_opened(tmp_path):
    run_ranks(save_twice, 1, tmp_path)
    assert run_ranks(newest, 1, tmp_path) == [11]


@pytest.mark.parametrize(("missing", "message"), [("config.yaml", "No such file"), ("checkpoints", "train the run")])
def test_a_folder_that_lacks_something_is_refused_by_name(missing, message, trained, tmp_path):
    if missing == "checkpoints":
        (tmp_path / "config.yaml").write_bytes((trained[0] / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match=message) as refused:
        run_ranks(newest, 1, tmp_path)
    assert str(tmp_path / missing) in str(refused.value)
