"""A trained run draws the same pictures in every layout, shared among the data-parallel ranks or not."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from megadit.encoders.condition import Labels
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.launch import Process
from megadit.sampling.generate import SampleConfig
from megadit.sampling.picture import to_bytes
from megadit.training.build import named_parameters
from megadit.training.config import check, load_config
from megadit.training.drawn import as_drawn
from megadit.training.restore import open_sampler
from tests.ranks import run_ranks, train_on

CONFIG = "tests/configs/tiny.yaml"
STEPS = 60
LAYOUTS = {
    "tensor2": (2, ParallelConfig(tensor=2)),
    "tensor2_sequence": (2, ParallelConfig(tensor=2, sequence=True)),
    "expert2": (2, ParallelConfig(expert=2)),
    "pipeline2": (2, ParallelConfig(pipeline=2)),
    "pipeline2_zbv": (2, ParallelConfig(pipeline=2, schedule="zbv")),
    "pipeline2_interleaved_data2": (4, ParallelConfig(pipeline=2, schedule="interleaved")),
    "tensor2_expert2": (4, ParallelConfig(tensor=2, expert=2)),
    "expert2_data2": (4, ParallelConfig(expert=2)),
    "data4": (4, ParallelConfig()),
    "data3": (3, ParallelConfig()),
}
SETTINGS = SampleConfig("heun", steps=4, guidance=3.0, shift=2.0)
CAPTIONS = [f"{words} {digit}" for words in ("a handwritten", "the number") for digit in range(8)]
NUMBERS = ["7", "3", "9", "0", "5"]
# Of five pictures in pairs the last pair is filled; four data-parallel ranks have three pairs.
JOBS = {
    "captions": ("captions", CAPTIONS, {}),
    "in calls of 3": ("captions", CAPTIONS, {"batch": 3}),
    "uneven": ("captions", CAPTIONS[:5], {"size": (12, 8)}),
    "float32": ("float32", CAPTIONS, {}),
    "pairs": ("pairs", NUMBERS, {}),
    "pairs in calls of 2": ("pairs", NUMBERS, {"batch": 2}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{name: the folder of a run}, one also as a run in float32."""
    runs = tmp_path_factory.mktemp("drawn")
    pairs = ["model.conditioning=class", "model.classes=10", "model.routing_group=2"]
    # What training forbids of zbv, drawing need not.
    for name, overrides in {"captions": ["run.recompute=block"], "pairs": pairs}.items():
        (ended,) = train_on(1, "--config", CONFIG, f"run.dir={runs / name}", f"run.steps={STEPS}", *overrides)
        assert ended[0] == 0, ended[1]
    shutil.copytree(runs / "captions", runs / "float32")
    path = runs / "float32" / "config.yaml"
    path.write_text(path.read_text().replace("dtype: float64", "dtype: float32"))
    return {name: runs / name for name in ("captions", "float32", "pairs")}


def process(rank, world_size):
    return Process(rank, world_size, rank, torch.device("cpu"))


def draw_jobs(rank, world_size, folders, parallel, jobs):
    """Of each job: (all pictures, [(indices, images) of this rank's shares], the ranges told of, whether it writes)."""
    results = []
    for name, prompts, keywords in jobs:
        sampler, told = open_sampler(folders[name], process(rank, world_size), parallel), []
        whole = sampler.draw_all(prompts, SETTINGS, 7, **keywords)
        shares = [
            (list(indices), images.numpy())
            for indices, images in sampler.shares(prompts, SETTINGS, 7, drawn=told.append, **keywords)
        ]
        results.append((whole.numpy(), shares, [(each.start, each.stop) for each in told], sampler.writes))
    return results


def draw_in_layout(folders, world_size, parallel):
    return run_ranks(draw_jobs, world_size, folders, parallel, list(JOBS.values()))


@pytest.fixture(scope="module")
def alone(trained):
    (results,) = draw_in_layout(trained, 1, None)
    return {name: whole for name, (whole, *_) in zip(JOBS, results, strict=True)}


@pytest.mark.slow
def test_the_runs_are_trained_and_their_experts_choose(trained):
    for name in ("captions", "pairs"):
        lines = [json.loads(line) for line in (trained[name] / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines]
        assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
        for layer in lines[-1]["routing"].values():
            assert layer["entropy"] < 1.0 and layer["busiest"] > 1.2 * layer["picks"], "experts tell tokens apart"


def worst(one, other):
    return float(np.abs(one - other).max())


def levels(pictures):
    return to_bytes(torch.from_numpy(pictures)).numpy().astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_pictures_of_one_process(layout, trained, alone):
    world_size, parallel = LAYOUTS[layout]
    of_ranks = draw_in_layout(trained, world_size, parallel)
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    for number, name in enumerate(JOBS):
        expected, tolerance = alone[name], 1e-4 if name == "float32" else 1e-9
        written = []
        for whole, shares, told, writes in (results[number] for results in of_ranks):
            assert worst(whole, expected) <= tolerance
            assert np.abs(levels(whole) - levels(expected)).max() <= 1
            assert [index for begin, end in told for index in range(begin, end)] == list(range(len(expected)))
            for indices, images in shares:
                assert images.shape == (len(indices), *expected.shape[1:])
                assert len(indices) == 0 or worst(images, expected[indices]) <= tolerance
                written += indices if writes else []
        turns = {len(results[number][1]) for results in of_ranks}
        assert len(turns) == 1, "every rank has as many turns"
        assert sorted(written) == list(range(len(expected))), "each picture is written once"
        assert sum(results[number][3] for results in of_ranks) == replicas


@pytest.mark.slow
def test_pictures_are_shared_out(trained):
    of_ranks = run_ranks(draw_jobs, 4, trained, None, [JOBS["captions"], JOBS["pairs"], JOBS["in calls of 3"]])
    indices = [[[part for part, _ in shares] for _, shares, *_ in results] for results in of_ranks]
    assert [rank[0] for rank in indices] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]], [[12, 13, 14, 15]]]
    assert [rank[1] for rank in indices] == [[[0, 1]], [[2, 3]], [[4]], [[]]]
    assert [rank[2] for rank in indices] == [
        [[0, 1, 2], [12]],
        [[3, 4, 5], [13]],
        [[6, 7, 8], [14]],
        [[9, 10, 11], [15]],
    ]


def draw_rest(rank, world_size, folder, there):
    """What is drawn beside what is there: indices by turn, and pictures."""
    sampler = open_sampler(folder, process(rank, world_size))
    shares = list(sampler.shares(CAPTIONS, SETTINGS, 7, batch=2, there=there))
    return [list(indices) for indices, _ in shares], torch.cat([images for _, images in shares]).numpy()


@pytest.mark.slow
def test_turns_whose_pictures_are_there_are_left_out(trained, alone):
    of_ranks = run_ranks(draw_rest, 2, trained["captions"], {0, 1, 2, 3, 4, 5, 6, *range(8, 16)})
    assert [turns for turns, _ in of_ranks] == [[[4, 5]], [[6, 7]]]
    for (indices,), pictures in of_ranks:
        assert worst(pictures, alone["captions"][indices]) <= 1e-9


@pytest.mark.parametrize("recompute", ["none", "block", "moe"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_matters_backward_alone_forbids_no_layout(recompute, stage, compiled):
    overrides = [f"run.recompute={recompute}", f"zero.stage={stage}", f"run.compile={compiled}", "run.dtype=float32"]
    trained = load_config(CONFIG, overrides)
    for world_size, parallel in LAYOUTS.values():
        config = as_drawn(trained, world_size, parallel)
        check(config, world_size)
        assert config.run.compile == (compiled and parallel.schedule != "zbv")


class Unreadable(Labels):
    """A condition whose prompts lie where this rank cannot read them."""

    def encode(self, prompts):
        raise ValueError("a shard is gone")


def refusals(rank, world_size, folders, without_tokenizer):
    """What every rank hears of faults that are one rank's, or come before a checkpoint is read."""
    here, messages = process(rank, world_size), []

    def refused(call):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))

    refused(lambda: open_sampler(without_tokenizer if rank == 1 else folders["captions"], here))
    refused(lambda: open_sampler(without_tokenizer, here, ParallelConfig(tensor=3)))
    sampler = open_sampler(folders["pairs"], here)
    if rank == 1:
        sampler = replace(sampler, condition=Unreadable(10))
    refused(lambda: list(sampler.shares(NUMBERS, SETTINGS, 7)))
    refused(lambda: sampler.draw_all(NUMBERS, SETTINGS, 7))
    # The fault is in another rank's share.
    refused(lambda: sampler.shares([*NUMBERS, "ten"], SETTINGS, 7))
    refused(lambda: sampler.shares([*NUMBERS, " "], SETTINGS, 7))
    refused(lambda: sampler.shares([], SETTINGS, 7))
    refused(lambda: sampler.shares(NUMBERS, SETTINGS, 7, size=(8, 7)))
    if rank == 1:  # a replica whose memory has gone bad
        named_parameters(sampler.pipeline.stages)[0][1].data.fill_(float("inf"))
    sampler = replace(sampler, condition=Labels(10))
    refused(lambda: list(sampler.shares(NUMBERS, SETTINGS, 7)))
    return messages


@pytest.mark.slow
def test_faults_are_heard_on_every_rank(trained, tmp_path):
    folder = shutil.copytree(trained["captions"], tmp_path / "run")
    (folder / "tokenizer.model").unlink()
    (folder / "checkpoints" / "latest").unlink(missing_ok=True)
    first, second = run_ranks(refusals, 2, trained, folder)
    assert first == second
    expected = [
        f"{folder / 'tokenizer.model'} is missing: the run's weights know no other tokenizer",
        "parallel.tensor=3 does not divide model.heads=4",
        "a shard is gone",
        "a shard is gone",
        "prompt 'ten' is not a class; write its number, 0 to 9",
        "prompt 5 is empty; say what to draw",
        "no prompts; say what to draw",
        "latent images of 8 x 7 cannot be cut into patches",
        "of 4 pictures 4 are not finite, from step 1 of 4 on",
    ]
    assert len(first) == len(expected)
    for message, beginning in zip(first, expected, strict=True):
        assert message.startswith(beginning)


def warned(rank, world_size, folder, prompts):
    """The log of drawing these prompts, two on each rank."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megadit").addHandler(handler)
    sampler = open_sampler(folder, process(rank, world_size))
    list(sampler.shares(prompts, SampleConfig("euler", steps=1), 7))
    logging.getLogger("megadit").removeHandler(handler)
    return lines


@pytest.mark.slow
def test_the_main_process_warns_once_of_prompts_that_others_draw(trained):
    long = "a very long caption of the number seven " * 3
    first, second = run_ranks(warned, 2, trained["captions"], ["a seven", "a six", long, long])
    assert first == [f"the prompt {long!r} is cut to the 28 tokens that the model reads"]
    assert second == []
    many = [f"{long} {number}" for number in range(13)]
    lines, _ = run_ranks(warned, 2, trained["captions"], many)
    assert len(lines) == 11 and lines[-1] == "and 3 more like it"
