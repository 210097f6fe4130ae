"""Pictures do not depend on the layout, on their neighbours, or on how the prompts are chunked."""

from dataclasses import replace

import pytest
import torch

from megadit.parallel.grid import Grid
from megadit.parallel.init import Normal, initialise
from megadit.sampling.generate import SampleConfig, generate
from megadit.training.build import build_model, build_pipeline, read_inputs
from megadit.training.config import check, load_config
from tests.parity.layouts import CONFIG, LAYOUTS
from tests.ranks import run_ranks

PROMPTS = ["a handwritten seven", "the digit 3", "a nine in ink", "zero", "the number five"]
SETTINGS = SampleConfig(sampler="heun", steps=3, guidance=2.0, shift=2.0)
# What is drawn: (prompts, settings, seed, first index).
WHOLE = (PROMPTS, SETTINGS, 7, 0)


def draw(rank, world_size, overrides, jobs):
    """The pictures of each job, or the message of the ValueError that refuses it."""
    config = load_config(CONFIG, overrides)
    grid = Grid(check(config, world_size), rank)
    model = build_model(config, grid, torch.device("cpu"))
    initialise(model.named_parameters(), grid, 1, lambda name: Normal(0.2))
    pipeline = build_pipeline(config, model, grid, torch.device("cpu"))
    tokenizer = read_inputs(config).tokenizer
    results = []
    for prompts, settings, seed, first_index in jobs:
        try:
            pictures = generate(
                pipeline, tokenizer, prompts, (1, 8, 8), config.text.length, settings, seed, config.dtype, first_index
            )
            results.append(pictures.numpy())
        except ValueError as error:
            results.append(str(error))
    return results


JOBS = {
    "whole": WHOLE,
    "head": (PROMPTS[:2], SETTINGS, 7, 0),
    "tail": (PROMPTS[2:], SETTINGS, 7, 2),
    "neighbours": (["one", *PROMPTS[1:2], "the digit 8"], SETTINGS, 7, 0),
    "same_prompt": (["zero"] * 2, SETTINGS, 7, 0),
    "other_seed": (PROMPTS, SETTINGS, 8, 0),
    "unguided": (PROMPTS, replace(SETTINGS, guidance=1.0), 7, 0),
    "euler": (PROMPTS, replace(SETTINGS, sampler="euler"), 7, 0),
    "empty": (["zero", "  "], SETTINGS, 7, 3),
}


@pytest.fixture(scope="module")
def drawn():
    """{job: its pictures}, on one process."""
    results = run_ranks(draw, 1, [], list(JOBS.values()))[0]
    return {
        name: result if isinstance(result, str) else torch.from_numpy(result)
        for name, result in zip(JOBS, results, strict=True)
    }


def difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("layout", ["tensor2", "pipeline2", "expert2", "tensor2_expert2"])
def test_every_layout_draws_the_same_pictures_on_every_rank(layout, drawn):
    world_size, overrides = LAYOUTS[layout]
    for pictures in run_ranks(draw, world_size, overrides, [WHOLE]):
        torch.testing.assert_close(torch.from_numpy(pictures[0]), drawn["whole"], rtol=0, atol=1e-9)


def test_pictures_are_finite_and_follow_the_seed_the_prompt_and_the_settings(drawn):
    whole = drawn["whole"]
    assert whole.shape == (5, 1, 8, 8) and whole.dtype == torch.float64 and whole.isfinite().all()
    for job in ("other_seed", "unguided", "euler"):
        for picture, other in zip(whole, drawn[job], strict=True):
            assert difference(picture, other) > 1e-3, job
    assert difference(whole[0], drawn["same_prompt"][0]) > 1e-3  # another prompt, the same noise
    assert difference(*drawn["same_prompt"]) > 1e-3  # the same prompt, other noise


def test_a_picture_does_not_depend_on_how_prompts_are_chunked(drawn):
    chunks = torch.cat([drawn["head"], drawn["tail"]])
    torch.testing.assert_close(chunks, drawn["whole"], rtol=0, atol=1e-12)


def test_a_picture_does_not_depend_on_its_neighbours(drawn):
    torch.testing.assert_close(drawn["neighbours"][1], drawn["whole"][1], rtol=0, atol=1e-12)


def test_an_empty_prompt_is_refused_by_its_index(drawn):
    assert drawn["empty"] == "prompt 4 is empty; say what to draw"
