"""GenEval's and DPG-Bench's folders: of any layout the same pictures, gone on with after a kill, and refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.evaluation import drawing, geneval
from megadit.evaluation.geneval_check import check_folder
from megadit.evaluation.painter import Painter
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.launch import Process
from megadit.sampling.picture import to_bytes
from megadit.training.config import RunConfig
from megadit.training.decoder import Decoder, open_decoder
from megadit.training.restore import open_sampler
from tests.evaluation.test_geneval import LINES
from tests.ranks import run_ranks, train_on
from tools import tiny_encoders as tiny

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "data2": (2, ParallelConfig()),
    "pipeline2": (2, ParallelConfig(pipeline=2)),
    "tensor2 x expert2": (4, ParallelConfig(tensor=2, expert=2)),
}
DPG = {"a1": "the digit three,\nwritten by hand", "b": "number seven", "c 2": "a handwritten one"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawing")
    groups = ["model.routing_group=batch", "data.micro_batch=3"]
    runs = {
        "digits": [],
        "groups": [*groups, "data.global_batch=12"],
        "classes": ["model.conditioning=class", "model.classes=10"],
    }
    for name, overrides in runs.items():
        few = ["run.steps=2", "optim.lr=0.02", "optim.warmup=1"]
        train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={root / name}", *few, *overrides)
    return root


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "evaluation_metadata.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture(scope="module")
def prompt_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpg prompts")
    for name, text in DPG.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def painter_of(rank, world_size, run, parallel, decoder=None, size=None, **settings):
    sampler = open_sampler(run, Process(rank, world_size, rank, torch.device("cpu")), parallel)
    how = sampler.config.sample.__class__(**{**sampler.config.sample.__dict__, **settings})
    return Painter(run, sampler, decoder or Decoder(), how, 3, size, batch=2)


def draw_geneval(rank, world_size, run, parallel, prompts, out, settings):
    return drawing.draw_geneval(painter_of(rank, world_size, run, parallel, **settings), prompts, out)


def draw_dpg(rank, world_size, run, parallel, prompts, out):
    return drawing.draw_dpg(painter_of(rank, world_size, run, parallel), prompts, out)


def fails_on_rank_1(rank, world_size, run, prompts, out):
    """What each rank hears of a decoder that refuses on one of them."""

    def decode(images_BCHW):
        if rank == 1:
            raise ValueError("these latents cannot be decoded")
        return images_BCHW

    painter = painter_of(rank, world_size, run, ParallelConfig(), decoder=Decoder(decode))
    with pytest.raises(ValueError) as refused:
        drawing.draw_geneval(painter, prompts, out)
    return str(refused.value)


def test_all_ranks_end_where_one_cannot_decode(trained, prompt_file, tmp_path):
    heard = run_ranks(fails_on_rank_1, 2, trained / "digits", prompt_file, tmp_path / "out")
    assert heard == ["these latents cannot be decoded"] * 2


def pixels(path):
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture).astype(int)


def directly(rank, world_size, run, prompts):
    """What `Sampler.draw` makes of all prompts at once, in bytes."""
    painter = painter_of(rank, world_size, run, None)
    return to_bytes(painter.sampler.draw(prompts, painter.settings, painter.seed)).numpy()


@pytest.fixture(scope="module")
def expected(trained):
    """Each run's pictures of GenEval's prompts, four of each, drawn in one batch."""
    texts = [json.loads(line)["prompt"] for line in LINES for _ in range(4)]
    return {name: run_ranks(directly, 1, trained / name, texts)[0] for name in ("digits", "groups")}


@pytest.mark.parametrize("run", ["digits", "groups"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_published_folder_with_the_pictures_of_one_process(
    layout, run, trained, prompt_file, expected, tmp_path
):
    world_size, parallel = LAYOUTS[layout]
    results = run_ranks(draw_geneval, world_size, trained / run, parallel, prompt_file, tmp_path / "out", {})
    assert results[0]["drawn_now"] == results[0]["images"] == 12
    assert check_folder(tmp_path / "out", geneval.read_prompts(prompt_file)) == []
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "out.json"]
    for i in range(3):
        samples = [pixels(geneval.sample_path(tmp_path / "out", i, k)) for k in range(4)]
        for k, sample in enumerate(samples):
            # Grey as RGB; a value between two bytes may go either way.
            assert np.abs(sample - expected[run][4 * i + k][0][..., None]).max() <= 1
        rows = [np.concatenate(samples[k : k + 2], axis=1) for k in (0, 2)]
        assert (pixels(tmp_path / f"out/0000{i}/grid.png") == np.concatenate(rows)).all()
        assert (tmp_path / f"out/0000{i}/metadata.jsonl").read_text() == f"{LINES[i]}\n"


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def mark(path):
    """Another picture in place of one that must not be drawn again."""
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.mark.parametrize("run", ["digits", "groups"])
def test_a_complete_prompt_is_not_drawn_again_and_others_are_as_they_would_have_been(
    run, trained, prompt_file, tmp_path
):
    arguments = (trained / run, None, prompt_file, tmp_path / "out", {})
    run_ranks(draw_geneval, 1, *arguments)
    whole = contents(tmp_path / "out")
    kept = tmp_path / "out/00000/samples/0001.png"
    mark(kept)
    red = kept.read_bytes()
    (tmp_path / "out/00001/samples/0002.png").unlink()  # killed while its pictures were written
    shutil.rmtree(tmp_path / "out/00002")  # before they were
    (result,) = run_ranks(draw_geneval, 1, *arguments)
    assert result["drawn_now"] == 8
    found = contents(tmp_path / "out")
    assert found.pop(kept.relative_to(tmp_path / "out")) == red
    assert found == {path: content for path, content in whole.items() if path != kept.relative_to(tmp_path / "out")}
    (again,) = run_ranks(draw_geneval, 1, *arguments)
    assert again["drawn_now"] == 0


def test_a_folder_of_other_settings_is_refused(trained, prompt_file, tmp_path):
    out = tmp_path / "out"
    run_ranks(draw_geneval, 1, trained / "digits", None, prompt_file, out, {})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="out holds pictures of other settings: guidance was 3.0 and is 1.5 now"):
        run_ranks(draw_geneval, 2, trained / "digits", None, prompt_file, out, {"guidance": 1.5})
    with pytest.raises(ValueError, match="other settings: run was"):
        run_ranks(draw_geneval, 1, trained / "groups", None, prompt_file, out, {})
    (tmp_path / "prompts.jsonl").write_text(LINES[0])
    with pytest.raises(ValueError, match="other settings: prompts_sha256 was"):
        run_ranks(draw_geneval, 1, trained / "digits", None, tmp_path / "prompts.jsonl", out, {})
    (tmp_path / "prompts.jsonl").unlink()
    assert contents(tmp_path) == before
    (tmp_path / "out.json").unlink()
    with pytest.raises(ValueError, match="out is not empty, and there is no .*out.json that says what it holds"):
        run_ranks(draw_geneval, 1, trained / "digits", None, prompt_file, out, {})


def test_a_file_in_place_of_the_folder_is_refused_on_all_ranks(trained, prompt_file, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="--out .*out is a file; name a folder"):
        run_ranks(draw_geneval, 2, trained / "digits", None, prompt_file, tmp_path / "out", {})


def test_a_run_that_is_told_classes_is_refused(trained, prompt_file, prompt_folder, tmp_path):
    for draw, prompts, extra in ((draw_geneval, prompt_file, [{}]), (draw_dpg, prompt_folder, [])):
        with pytest.raises(ValueError, match=r"is told classes \(model.conditioning=class\), not captions; .* needs a"):
            run_ranks(draw, 2, trained / "classes", None, prompts, tmp_path / "out", *extra)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpgs_grids_are_two_by_two_and_named_as_the_prompts(layout, trained, prompt_folder, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    out = tmp_path / "out"
    run_ranks(draw_dpg, world_size, trained / "digits", parallel, prompt_folder, out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a1.png", "b.png", "c 2.png", "out", "out.json"]
    texts = [" ".join(text.split()) for text in DPG.values() for _ in range(4)]
    (expected,) = run_ranks(directly, 1, trained / "digits", texts)
    for i, name in enumerate(DPG):
        grid = pixels(out / f"{name}.png")
        assert grid.shape == (16, 16, 3)
        for k in range(4):
            cell = grid[k // 2 * 8 :, k % 2 * 8 :][:8, :8]
            assert np.abs(cell - expected[4 * i + k][0][..., None]).max() <= 1
    mark(out / "b.png")
    red = (out / "b.png").read_bytes()
    before = pixels(out / "a1.png")
    (out / "a1.png").unlink()
    (result, *_) = run_ranks(draw_dpg, world_size, trained / "digits", parallel, prompt_folder, out)
    assert result["drawn_now"] == 4
    assert (out / "b.png").read_bytes() == red
    assert np.abs(pixels(out / "a1.png") - before).max() <= 1


@pytest.mark.parametrize(
    ("files", "message"), [({}, "no prompts"), ({"a.txt": " \n"}, "a.txt: no prompt in it"), (None, "No such file")]
)
def test_a_folder_without_prompts_is_refused(files, message, tmp_path):
    from megadit.evaluation.dpg import read_prompts

    folder = tmp_path / "prompts"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(folder)


def test_latents_are_decoded(tmp_path):
    tiny.make_autoencoder(tmp_path / "vae", channels=4, downscale=2)
    run = RunConfig()
    run = replace(run, model=replace(run.model, channels=4))
    decoder = open_decoder(run, str(tmp_path / "vae"), torch.device("cpu"))
    config = SimpleNamespace(model=SimpleNamespace(channels=4, patch=1))
    sampler = SimpleNamespace(config=config)
    pictures = Painter(tmp_path, sampler, decoder, None, 0).pictures(torch.randn(2, 4, 4, 6))
    assert [(one.mode, one.size) for one in pictures] == [("RGB", (12, 8))] * 2
    Painter(tmp_path, sampler, decoder, None, 0).check_shows()
    with pytest.raises(ValueError, match="draws latents of 4 channels; name the autoencoder"):
        Painter(tmp_path, sampler, Decoder(), None, 0).check_shows()
    with pytest.raises(ValueError, match="--size 7x8 must be multiples of 2 pixels"):
        Painter(tmp_path, sampler, decoder, None, 0, size=(7, 8)).check_shows()
