"""Pictures do not depend on the layout, on pictures of other routing groups, or on how the prompts are chunked."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megadit.diffusion.timesteps import sampling_times
from megadit.parallel.grid import Grid
from megadit.parallel.init import Normal, initialise
from megadit.runtime.seed import stream
from megadit.sampling.generate import SampleConfig, generate, noise_of, steered_from
from megadit.sampling.solvers import SAMPLERS
from megadit.training.build import build_pipeline, build_stages, named_parameters, read_inputs
from megadit.training.config import check, images_per_group, load_config
from tests.ranks import run_ranks
from tests.tiers import slow_but

CONFIG = "tests/configs/tiny.yaml"
LAYOUTS = {
    "tensor2": (2, ["parallel.tensor=2"]),
    "pipeline4": (4, ["parallel.pipeline=4"]),  # more microbatches than branches: they could cut groups
    "expert2": (2, ["parallel.expert=2"]),
    "tensor2_expert2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "pipeline2_zbv": (2, ["parallel.pipeline=2", "parallel.schedule=zbv"]),
}
CLASSES = ["model.conditioning=class", "model.classes=10"]
MODELS = {
    "captions": [],
    "classes": CLASSES,
    "pairs": ["model.routing_group=2"],
    "batch": ["model.routing_group=batch", "data.micro_batch=4"],
    "class_pairs": [*CLASSES, "model.routing_group=2"],
}
PROMPTS = ["a handwritten seven", "the digit 3", "a nine in ink", "zero", "the number five"]
NUMBERS = ["7", "3", "9", "0", "5"]
SETTINGS = SampleConfig(sampler="heun", steps=3, guidance=2.0, shift=2.0)


def jobs_of(model):
    """What is drawn, by name: (prompts, settings, seed, first index)."""
    prompts, other = (NUMBERS, "1") if "class" in model else (PROMPTS, "number one")
    return {
        "whole": (prompts, SETTINGS, 7, 0),
        "head": (prompts[:4], SETTINGS, 7, 0),
        "tail": (prompts[4:], SETTINGS, 7, 4),
        "filled": ([*prompts, *prompts[-1:] * 3], SETTINGS, 7, 0),
        "other_first": ([other, *prompts[1:]], SETTINGS, 7, 0),
        "same_prompt": (prompts[:1] * 5, SETTINGS, 7, 0),
        "other_seed": (prompts, SETTINGS, 8, 0),
        "unguided": (prompts, replace(SETTINGS, guidance=1.0), 7, 0),
        "euler": (prompts, replace(SETTINGS, sampler="euler"), 7, 0),
        "one_step": (prompts, replace(SETTINGS, sampler="euler", steps=1), 7, 8),
        "empty": ([prompts[0], "  "], SETTINGS, 7, 4),
        "within": (prompts, SETTINGS, 7, 3),
        "none": ([], SETTINGS, 7, 0),
    }


def assembled(rank, world_size, overrides, init=lambda name: Normal(0.2)):
    """(configuration, this rank's stages, their pipeline, condition)."""
    config = load_config(CONFIG, overrides)
    grid = Grid(check(config, world_size), rank)
    stages = build_stages(config, grid, torch.device("cpu"))
    initialise(named_parameters(stages), grid, 1, init)
    return config, stages, build_pipeline(config, stages, grid, torch.device("cpu")), read_inputs(config).condition


def draw(rank, world_size, overrides, jobs):
    """The pictures of each job, or the message of the ValueError that refuses it."""
    config, _, pipeline, condition = assembled(rank, world_size, overrides)
    results = []
    for prompts, settings, seed, first_index in jobs:
        try:
            pictures = generate(
                *(pipeline, condition, prompts, (1, 8, 8), settings, seed, config.dtype),
                first_index=first_index,
                group=images_per_group(config),
            )
            results.append(pictures.numpy())
        except ValueError as error:
            results.append(str(error))
    return results


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def group(model):
    return images_per_group(load_config(CONFIG, MODELS[model]))


@pytest.fixture(scope="module")
def drawn(model):
    """{job: its pictures, or why it was refused}, on one process."""
    jobs = jobs_of(model)
    results = run_ranks(draw, 1, MODELS[model], list(jobs.values()))[0]
    return {
        name: result if isinstance(result, str) else torch.from_numpy(result)
        for name, result in zip(jobs, results, strict=True)
    }


def assert_same(one, other, tolerance=1e-12):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def distances(one, other):
    """The largest difference of each picture."""
    return (one - other).abs().flatten(1).amax(dim=1)


@pytest.mark.parametrize("layout", slow_but({"tensor2_expert2", "pipeline2_zbv"}, LAYOUTS))
def test_every_layout_draws_the_same_pictures_on_every_rank(layout, model, drawn):
    world_size, overrides = LAYOUTS[layout]
    names = ("whole", "tail")
    jobs = [jobs_of(model)[name] for name in names]
    for pictures in run_ranks(draw, world_size, [*MODELS[model], *overrides], jobs):
        for name, found in zip(names, pictures, strict=True):
            assert_same(torch.from_numpy(found), drawn[name], tolerance=1e-9)


def test_pictures_are_finite_and_follow_the_seed_the_prompt_and_the_settings(drawn):
    whole = drawn["whole"]
    assert whole.shape == (5, 1, 8, 8) and whole.dtype == torch.float64 and whole.isfinite().all()
    for job in ("other_seed", "unguided", "euler"):
        assert (distances(whole, drawn[job]) > 1e-3).all(), job
    assert (distances(whole, drawn["same_prompt"])[1:] > 1e-3).all()  # another prompt, the same noise
    assert (distances(drawn["same_prompt"][:1], drawn["same_prompt"][1:]) > 1e-3).all()  # the same prompt, other noise


def test_a_picture_does_not_depend_on_how_prompts_are_chunked_or_the_last_group_is_filled(drawn):
    assert_same(torch.cat([drawn["head"], drawn["tail"]]), drawn["whole"])
    assert_same(drawn["filled"][:5], drawn["whole"])


def test_a_picture_depends_on_the_prompts_of_its_own_group_only(group, drawn):
    changed = distances(drawn["other_first"], drawn["whole"])
    assert (changed[:group] > 1e-6).all()
    assert (changed[group:] < 1e-12).all()


def test_a_batch_that_begins_within_a_group_is_refused(group, drawn):
    if group == 1:
        assert drawn["within"].shape == drawn["whole"].shape
    else:
        assert drawn["within"].startswith(f"first_index=3 is within a group of {group} images")


def test_prompts_that_say_nothing_are_refused(drawn):
    assert drawn["empty"] == "prompt 5 is empty; say what to draw"
    assert drawn["none"] == "no prompts; say what to draw"


def by_hand(rank, world_size, overrides, prompts, first_index, group):
    """One Euler step of the bare network, guidance 2, each group and each branch on its own."""
    _, (network,), _, condition = assembled(rank, world_size, overrides)
    filled = [*prompts, *prompts[-1:] * (-len(prompts) % group)]
    noise = noise_of(7, range(first_index, first_index + len(filled)), (1, 8, 8))
    pictures = []
    with torch.no_grad():
        for begin in range(0, len(filled), group):
            images, told = noise[begin : begin + group], condition.encode(filled[begin : begin + group])
            nothing = {key: value.expand_as(told[key]) for key, value in condition.nothing.items()}
            fixed = {"timesteps_B": torch.ones(group, dtype=torch.float64), "size": (8, 8)}
            given, free = (network(images, **fixed, **keywords) for keywords in (told, nothing))
            pictures.append(images - (free + 2 * (given - free)))
    return torch.cat(pictures)[: len(prompts)].numpy()


def test_a_step_is_the_guided_velocity_of_each_group(model, group, drawn):
    prompts, _, _, first_index = jobs_of(model)["one_step"]
    (expected,) = run_ranks(by_hand, 1, MODELS[model], prompts, first_index, group)
    assert_same(drawn["one_step"], torch.from_numpy(expected))


def untrained(rank, world_size, dtype):
    """Pictures of a network whose velocity is zero."""
    overrides = [f"run.dtype={dtype}", "zero.stage=1"]
    config, _, pipeline, condition = assembled(rank, world_size, overrides, init=lambda name: Normal(0.0))
    pictures = generate(pipeline, condition, PROMPTS, (1, 8, 8), SETTINGS, 7, config.dtype, first_index=3)
    return pictures.numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_summed_in_float32_at_least(dtype):
    (pictures,) = run_ranks(untrained, 1, dtype)
    assert torch.equal(torch.from_numpy(pictures), noise_of(7, range(3, 8), (1, 8, 8)).float())


def test_an_images_noise_is_its_own():
    noise = noise_of(7, [5, 2], (3, 4, 4))
    assert noise.shape == (2, 3, 4, 4) and noise.dtype == torch.float64
    assert torch.equal(noise[1], noise_of(7, [2], (3, 4, 4))[0])
    assert torch.equal(noise[1], torch.randn(3, 4, 4, generator=stream(7, "sample", 2), dtype=torch.float64))
    assert (distances(noise, noise_of(8, [5, 2], (3, 4, 4))) > 0.1).all()


def answers(rank, world_size, overrides):
    """What the keyword arguments do, on a network of random weights: {name: pictures, or message, or what was seen}."""
    config, (network,), pipeline, condition = assembled(rank, world_size, overrides)
    group, shape, prompts = images_per_group(config), (1, 8, 8), PROMPTS[:3]

    def draw(prompts=prompts, seed=7, settings=SETTINGS, **keywords):
        try:
            return generate(
                *(pipeline, condition, prompts, shape, settings, seed, config.dtype), group=group, **keywords
            ).numpy()
        except ValueError as error:
            return f"{type(error).__name__}: {error}"

    seen, sizes = [], []

    def look(step, time, x):
        seen.append((step, time.item(), x.numpy().copy()))

    def spoil(step, time, x):
        return torch.where(torch.arange(3).view(3, 1, 1, 1) == 1, torch.nan, x) if step == 1 else None

    forward = pipeline.forward
    pipeline.forward = lambda batch, *args, **kwargs: sizes.append(len(batch)) or forward(batch, *args, **kwargs)
    found = {
        "plain": draw(),
        "looked": draw(on_step=look),
        "zeroed": draw(on_step=lambda step, time, x: 0 * x),
        "seen": seen,
        "given": draw(seed=3, latents=noise_of(7, range(3), shape)),
        "negative": draw(negative=[prompts[0], "", "  "]),
        "nothing": draw(negative=["", " ", ""]),
        "spoilt": draw(on_step=spoil),
        "shape": draw(latents=torch.zeros(3, 1, 8, 7)),
        "whole numbers": draw(latents=torch.zeros(3, 1, 8, 8, dtype=torch.int64)),
        "few": draw(negative=["a"]),
    }
    sizes.clear()
    draw(settings=replace(SETTINGS, sampler="euler", steps=4, shift=1.0, guidance_from=0.4, guidance_until=0.8))
    found["interval"] = list(sizes)
    sizes.clear()
    draw(settings=replace(SETTINGS, sampler="euler", guidance=1.0))
    found["unguided"] = list(sizes)
    filled = [*prompts, *prompts[-1:] * (-3 % group)]
    noise, told = noise_of(7, range(len(filled)), shape), condition.encode(filled)
    nothing = {key: value.expand_as(told[key]) for key, value in condition.nothing.items()}

    def velocity(x, timesteps):
        given, free = (network(x, timesteps_B=timesteps, size=(8, 8), **keywords) for keywords in (told, nothing))
        return free + 2 * (given - free)

    for sampler in SAMPLERS:
        found[sampler] = draw(settings=replace(SETTINGS, sampler=sampler, steps=5))
        with torch.no_grad():
            times = sampling_times(5, SETTINGS.shift, torch.float64)
            found[f"{sampler} by hand"] = SAMPLERS[sampler](velocity, noise, times)[:3].numpy()
    return found


@pytest.fixture(scope="module", params=["captions", "pairs"])
def answered(request):
    return run_ranks(answers, 1, MODELS[request.param])[0], 2 if request.param == "pairs" else 1


def test_each_step_is_shown_without_the_filling(answered):
    found, _ = answered
    np.testing.assert_array_equal(found["looked"], found["plain"])
    assert [step for step, *_ in found["seen"]] == [0, 1, 2]
    assert [time for _, time, _ in found["seen"]] == pytest.approx([0.8, 0.5, 0.0])
    assert all(images.shape == (3, 1, 8, 8) for *_, images in found["seen"])
    np.testing.assert_array_equal(found["seen"][-1][2], found["plain"])
    np.testing.assert_array_equal(found["zeroed"], 0)


def test_latents_are_started_from(answered):
    found, _ = answered
    if answered[1] == 1:
        np.testing.assert_array_equal(found["given"], found["plain"])
    else:  # the filling that the third image competes with has noise of another seed
        np.testing.assert_allclose(found["given"][:2], found["plain"][:2], rtol=0, atol=1e-12)
    wanted = "give floating-point ones of [3, 1, 8, 8]"
    assert found["shape"] == f"ValueError: latents are torch.float32 of [3, 1, 8, 7]; {wanted}"
    assert found["whole numbers"].startswith("ValueError: latents are torch.int64 of [3, 1, 8, 8]")


def test_a_negative_prompt_takes_the_place_of_nothing(answered):
    """Steered away from its own prompt, an image has no guidance."""
    found, group = answered
    np.testing.assert_array_equal(found["nothing"], found["plain"])
    changed = np.abs(found["negative"] - found["plain"]).reshape(3, -1).max(axis=1)
    assert changed[0] > 1e-3 and (changed[group:] < 1e-12).all()
    assert found["few"] == "ValueError: 1 negative prompts for 3 images; give one for each"


def test_each_image_is_steered_away_from_the_prompt_that_was_given_for_it():
    condition = SimpleNamespace(
        nothing={"labels_B": torch.tensor([0])},
        encode=lambda prompts: {"labels_B": torch.tensor(list(map(int, prompts)))},
    )
    steered = steered_from(condition, {"labels_B": torch.tensor([1, 2, 3, 4])}, ["", "7", " ", "8"])
    assert steered["labels_B"].tolist() == [0, 7, 0, 8]
    assert condition.nothing["labels_B"].tolist() == [0], "what stands for nothing stays as it is"


def test_pictures_that_are_not_finite_are_refused_by_name_and_step(answered):
    found, _ = answered
    assert found["spoilt"].startswith(
        "NotFinite: of 3 pictures 1 are not finite, from step 2 of 3 on: 1 ('the digit 3'); "
    )
    assert "in float32: run.dtype in the run's config.yaml, torch_dtype of a pipeline" in found["spoilt"]


def test_the_network_sees_both_branches_where_images_are_guided_alone(answered):
    found, group = answered
    batch = -(-3 // group) * group
    assert found["interval"] == [batch, 2 * batch, 2 * batch, batch]  # at 1, 0.75, 0.5, 0.25
    assert found["unguided"] == [batch] * 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_integrates_the_guided_velocity_of_the_bare_network(sampler, answered):
    found, _ = answered
    np.testing.assert_allclose(found[sampler], found[f"{sampler} by hand"], rtol=0, atol=1e-11)
