"""A run opened for sampling has the averages that its own ranks had, whatever their layout was."""

import json
import shutil

import numpy as np
import pytest
import torch

from megadit import checkpoint
from megadit.data.loader import open_dataset
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.launch import Process
from megadit.sampling.generate import SampleConfig, noise_of
from megadit.training.build import named_parameters
from megadit.training.config import check, images_per_group, load_config
from megadit.training.drawn import as_drawn
from megadit.training.evaluate import sample_pictures
from megadit.training.loop import prepare_directory, save
from megadit.training.progress import Progress
from megadit.training.restore import open_condition, open_sampler
from megadit.training.state import logical_state
from tests.ranks import run_ranks
from tests.training.assembled import CONFIG, after, assembled, train_alone

STEPS = 3
PROMPTS = ["a handwritten three", "the digit 7", "number one"]


def train_and_draw(rank, world_size, folder, overrides):
    """Train; this rank's averages as [(name, offsets, part)], and the pictures that its ranks draw together."""
    layout = ["parallel.tensor=2", "parallel.expert=2", "run.dtype=float32", "zero.stage=1"]
    run = assembled(rank, world_size, f"run.dir={folder}", f"run.steps={STEPS}", "optim.lr=0.02", *layout, *overrides)
    train_alone(run, Progress())
    state = logical_state(run.named, run.ema, run.engine, run.grid, owned_only=False)
    averages = [
        (name.removeprefix("ema."), piece.offsets, piece.tensor.numpy().copy())
        for name, tensor in state.items()
        for piece in tensor.pieces
        if name.startswith("ema.")
    ]
    return averages, sample_pictures(run).numpy()


def exactly(parameter):
    """As numpy, which has no bf16."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).numpy()


def process(rank, world_size):
    return Process(rank, world_size, rank, torch.device("cpu"))


def restored(rank, world_size, folder, parallel):
    """The sampler's step, weights, and pictures of the held-out prompts."""
    sampler = open_sampler(folder, process(rank, world_size), parallel)
    config = sampler.config
    # As `sample_pictures`.
    prompts = open_dataset(config.data, "heldout", config.model.conditioning).prompts(config.log.samples)
    pictures = sampler.draw(prompts, config.sample, config.run.seed)
    weights = {name: exactly(parameter) for name, parameter in named_parameters(sampler.pipeline.stages)}
    return sampler.step, weights, pictures.numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore") / "run"
    return folder, run_ranks(train_and_draw, 4, folder, [])


def test_one_process_restores_the_averages_of_four_bitwise(trained):
    folder, results = trained
    ((step, weights, _),) = run_ranks(restored, 1, folder, None)
    assert step == STEPS
    assert {name for averages, _ in results for name, *_ in averages} == weights.keys()
    for averages, _ in results:
        for name, offsets, part in averages:
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


def drawn_at(rank, world_size, folder, size, pipeline):
    """Pictures of this size, by the sampler, and by the whole network itself in one Euler step from their noise."""
    sampler = open_sampler(folder, process(rank, world_size), ParallelConfig(pipeline=pipeline))
    settings = SampleConfig("euler", steps=1, guidance=1.0)
    pictures = sampler.draw(PROMPTS, settings, 5, size=size)
    with pytest.raises(ValueError, match="8 x 7 cannot be cut into patches"):
        sampler.draw(PROMPTS, settings, 5, size=(8, 7))
    if pipeline > 1:
        return pictures.numpy(), None
    noise = noise_of(5, range(len(PROMPTS)), (1, *size)).float()
    told = sampler.condition.encode(PROMPTS)
    with torch.no_grad():
        velocity = sampler.pipeline.stages[0](noise, timesteps_B=torch.ones(len(PROMPTS)), size=size, **told)
    return pictures.numpy(), (noise - velocity).numpy()


@pytest.mark.parametrize("size", [(12, 8), (4, 16)])
def test_pictures_may_be_of_another_size(trained, size):
    ((pictures, by_hand),) = run_ranks(drawn_at, 1, trained[0], size, 1)
    assert pictures.shape == (3, 1, *size)
    np.testing.assert_allclose(pictures, by_hand, rtol=0, atol=1e-5)
    for cut, _ in run_ranks(drawn_at, 2, trained[0], size, 2):
        np.testing.assert_allclose(cut, pictures, rtol=0, atol=1e-5)


def test_bf16_weights_are_the_averages_rounded(tmp_path):
    results = run_ranks(train_and_draw, 4, tmp_path / "run", ["run.dtype=bfloat16"])
    ((_, weights, pictures),) = run_ranks(restored, 1, tmp_path / "run", None)
    finer = 0
    for averages, _ in results:
        for name, offsets, part in averages:
            assert part.dtype == np.float32
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape, strict=True))
            rounded = torch.from_numpy(part).bfloat16().float().numpy()
            np.testing.assert_array_equal(weights[name][place], rounded)
            finer += int((part != rounded).sum())
    assert finer > 0, "the averages lost their precision"
    assert pictures.dtype == np.float32 and np.isfinite(pictures).all()


def keep_weights_alone(rank, world_size, folder, kinds, dtype):
    """Make the run's newest checkpoint one as a conversion writes it: its weights, or more, in another precision."""
    path = checkpoint.latest(folder / "checkpoints")
    tensors = {
        name: tensor.to(dtype)
        for name, tensor in checkpoint.load_tensors(path).items()
        if name.partition(".")[0] in kinds
    }
    pieces = {name: (checkpoint.Piece((0,) * tensor.ndim, tensor),) for name, tensor in tensors.items()}
    logical = {name: checkpoint.LogicalTensor(tuple(t.shape), dtype, pieces[name]) for name, t in tensors.items()}
    checkpoint.save(path.parent, STEPS + 1, logical, checkpoint.read_manifest(path)["metadata"])
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("kinds", "dtype", "drawn"),
    [
        (["weight"], torch.float32, "weight"),
        (["weight"], torch.bfloat16, "weight"),
        (["weight", "ema"], torch.float32, "ema"),
    ],
    ids=["weights", "rounded weights", "weights and averages"],
)
def test_of_a_checkpoint_without_averages_the_weights_are_drawn_with(kinds, dtype, drawn, trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (tensors,) = run_ranks(keep_weights_alone, 1, folder, kinds, dtype)
    for step, weights, pictures in run_ranks(restored, 2, folder, ParallelConfig(pipeline=2)):
        assert step == STEPS + 1
        for name, weight in weights.items():
            assert weight.tobytes() == tensors[f"{drawn}.{name}"].tobytes(), name
        assert np.isfinite(pictures).all()


def test_a_tensor_that_the_checkpoint_lacks_is_named(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (manifest,) = (folder / "checkpoints").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    del content["tensors"]["ema.blocks.2.attention.q.weight"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ema.blocks.2.attention.q.weight: it is not in the checkpoint"):
        run_ranks(newest, 1, folder)


CLASS_GROUPS = ["model.conditioning=class", "model.classes=10", "model.routing_group=batch", "log.samples=6"]


@pytest.fixture(scope="module")
def trained_in_groups(tmp_path_factory):
    """A run told classes, whose four images of a microbatch compete; it draws six pictures."""
    folder = tmp_path_factory.mktemp("restore") / "groups"
    return folder, run_ranks(train_and_draw, 4, folder, CLASS_GROUPS)


def test_a_run_that_is_told_classes_keeps_no_tokenizer(trained_in_groups):
    assert (trained_in_groups[0] / "config.yaml").exists()
    assert not (trained_in_groups[0] / "tokenizer.model").exists()


@pytest.mark.parametrize("parallel", [None, ParallelConfig(pipeline=2)], ids=["one", "pipeline2"])
def test_classes_are_drawn_in_the_groups_of_the_training(parallel, trained_in_groups):
    folder, results = trained_in_groups
    world_size = 1 if parallel is None else 2
    for _, _, drawn in run_ranks(restored, world_size, folder, parallel):
        assert drawn.shape == (6, 1, 8, 8)
        np.testing.assert_allclose(drawn, results[0][1], rtol=0, atol=1e-6)


def refused_prompts(rank, world_size, folder):
    """Why the sampler of the run refuses a caption, and a batch that begins within a group."""
    sampler, messages = open_sampler(folder, process(rank, world_size)), []
    for prompts, first_index in ((["a handwritten seven"], 0), (["7"], sampler.group + 1)):
        with pytest.raises(ValueError) as refused:
            sampler.draw(prompts, sampler.config.sample, 0, first_index)
        messages.append(str(refused.value))
    return messages


def test_a_caption_for_classes_and_part_of_a_group_are_refused(trained_in_groups):
    ((caption, within),) = run_ranks(refused_prompts, 1, trained_in_groups[0])
    assert caption == "prompt 'a handwritten seven' is not a class; write its number, 0 to 9"
    assert "first_index=5 is within a group of 4 images" in within


@pytest.mark.parametrize(
    ("overrides", "group"),
    [
        ([], 1),
        (["model.routing_group=2"], 2),
        (["model.routing_group=batch", "data.micro_batch=8"], 8),
        (["model.routing_group=batch", "data.micro_batch=0", "model.experts=0"], 1),
        (["model.routing_group=batch", "model.routing=token_choice"], 4),
        # Nobody competes.
        (["model.routing_group=batch", "model.routing=token_choice", "model.dropless=true"], 1),
    ],
)
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, ParallelConfig()), (3, ParallelConfig()), (4, ParallelConfig(pipeline=2, schedule="interleaved"))],
)
def test_the_group_is_the_trainings_and_fits_every_layout(world_size, parallel, overrides, group):
    config = as_drawn(load_config(CONFIG, overrides), world_size, parallel)
    check(config, world_size)
    assert images_per_group(config) == group
    # Said outright: the batch of drawing is not that of training.
    assert config.model.routing_group == group


def test_without_a_capacity_pictures_are_those_of_the_groups_of_the_training(tmp_path):
    dropless = ["model.routing_group=batch", "model.routing=token_choice", "model.dropless=true"]
    results = run_ranks(train_and_draw, 4, tmp_path, dropless)
    ((_, _, drawn),) = run_ranks(restored, 1, tmp_path, None)
    np.testing.assert_allclose(drawn, results[0][1], rtol=0, atol=1e-6)


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
    prepare_directory(run).close()
    for step in (3, 11):
        save(run, after(step))


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


@pytest.mark.parametrize("overrides", [["data.path=gone"], ["data.path=gone", "text.t5=also gone"]])
def test_a_text_encoder_that_is_not_there_is_named_and_what_may_name_another(overrides, tmp_path):
    config = load_config(CONFIG, ["data.kind=shards", "text.kind=t5", *overrides])
    with pytest.raises(ValueError, match="gone.*; text.t5 in .*config.yaml may name what reads the prompts") as refused:
        open_condition(config, tmp_path, torch.device("cpu"))
    assert str(tmp_path / "config.yaml") in str(refused.value)
