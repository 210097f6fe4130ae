"""The pipeline against tools/sample.py, bit for bit, against itself from disk and a formula; and what it refuses."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import megadit
from megadit.parallel.layout import ParallelConfig
from megadit.pipeline import ECDiTPipeline
from megadit.runtime.launch import Process
from megadit.sampling.generate import NotFinite, SampleConfig, noise_of
from megadit.sampling.routing import recorded
from megadit.training.config import load_config
from megadit.training.restore import open_sampler
from tests.commands import run_python
from tests.conversion.made import make_run
from tests.launch.environment import environ
from tests.ranks import run_ranks, train_on

PROMPTS = ["a handwritten seven", "the digit 3", "number one"]
KINDS = {
    "captions": (PROMPTS, []),
    "bfloat16": (PROMPTS, ["run.dtype=bfloat16", "zero.stage=1"]),
    "classes": (["7", "3", "0"], ["model.conditioning=class", "model.classes=10", "model.routing_group=batch"]),
    "solver": (PROMPTS, ["sample.sampler=dpm++", "sample.steps=4", "sample.shift=2", "objective.shift_tokens=8"]),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as the ranks have that the pipeline is compared with: more of them cut sums otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def run(kind, tmp_path_factory):
    """A run of the real training, a step long."""
    folder = tmp_path_factory.mktemp(kind) / "run"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=1", *KINDS[kind][1])
    return folder


@pytest.fixture(scope="module")
def pipe(run):
    pipe = ECDiTPipeline.from_run(run)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A pipeline whose checkpoint was not trained."""
    folder = tmp_path_factory.mktemp("captions") / "run"
    train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", "run.steps=1")
    pipe = ECDiTPipeline.from_run(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cells(path, count):
    """The pictures of a grid one row high, of 8 x 8 pixels at zoom 1."""
    pixels = np.asarray(Image.open(path))
    return [pixels[1:9, 9 * i + 1 : 9 * i + 9] for i in range(count)]


def drawn_by_the_sampler(rank, world_size, folder, prompts, seed, changes):
    sampler = open_sampler(folder, Process(rank, world_size, rank, torch.device("cpu")), ParallelConfig())
    default = sampler.config.sample
    return [sampler.draw(prompts, settings, seed).numpy() for settings in (default, replace(default, **changes))]


def test_pictures_are_those_of_the_tool_bit_for_bit(kind, run, pipe, tmp_path):
    prompts = [prompt for prompt in KINDS[kind][0] for _ in range(2)]
    argv = ["--repeat", 2, "--seed", 5, "--zoom", 1, "--out", tmp_path / "grid.png"]
    done = run_python("tools/sample.py", run, *KINDS[kind][0], *argv, env=environ())
    assert done.returncode == 0, done.stderr
    pictures = pipe(KINDS[kind][0], num_images_per_prompt=2, generator=5).images
    for picture, cell in zip(pictures, cells(tmp_path / "grid.png", 6), strict=True):
        assert (picture.mode, picture.size) == ("L", (8, 8))
        assert np.array_equal(np.asarray(picture), cell)
    changes = {"guidance_rescale": 0.5, "guidance_until": 0.8, "sampler": "unipc", "steps": 4}
    ((default, changed),) = run_ranks(drawn_by_the_sampler, 1, run, prompts, 5, changes)
    before = pipe.scheduler
    for tensors, settings in ((default, before), (changed, replace(before, **changes))):
        pipe.scheduler = settings
        latents = pipe(KINDS[kind][0], num_images_per_prompt=2, generator=5, output_type="latent").images
        assert torch.equal(latents, torch.from_numpy(tensors))
    pipe.scheduler = before


def recorded_of_the_sampler(rank, world_size, folder, prompts):
    sampler = open_sampler(folder, Process(rank, world_size, rank, torch.device("cpu")), ParallelConfig())
    with recorded(sampler.pipeline) as recording:
        sampler.draw(prompts, sampler.config.sample, 5, progress=recording.steps())
    return vars(recording.trace(images=-(-len(prompts) // sampler.group) * sampler.group))


def test_what_is_recorded_is_the_routing_of_the_sampler(kind, run, pipe):
    prompts = KINDS[kind][0]
    plain = pipe(prompts, generator=5, output_type="latent").images
    with pipe.recorded() as recording:
        assert torch.equal(pipe(prompts, generator=5, output_type="latent").images, plain)
    found = vars(recording.trace(images=-(-len(prompts) // pipe.group) * pipe.group))
    (expected,) = run_ranks(recorded_of_the_sampler, 1, run, prompts)
    assert found.keys() == expected.keys() and found["layers"] == (1, 3)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    calls = len(recording.calls)
    assert torch.equal(pipe(prompts, generator=5, output_type="latent").images, plain)
    assert (len(recording.calls), pipe.network.listeners) == (calls, [])


def test_it_comes_back_from_disk_as_it_was(kind, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = ECDiTPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert (again.scheduler, again.dtype) == (pipe.scheduler, pipe.dtype)
    assert again.parts.config.objective.shift_tokens == pipe.parts.config.objective.shift_tokens
    mine, theirs = dict(pipe.transformer.named_parameters()), dict(again.transformer.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert parameter.dtype == theirs[name].dtype and torch.equal(parameter, theirs[name]), name
    prompts = KINDS[kind][0]
    ours, back = (each(prompts, generator=3, output_type="latent").images for each in (pipe, again))
    assert torch.equal(ours, back)
    again.save_pretrained(tmp_path / "twice")
    files = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
             for root in (tmp_path / "saved", tmp_path / "twice")]  # fmt: skip
    assert files[0] == files[1]


def test_one_euler_step_without_guidance_is_noise_minus_velocity(kind, pipe):
    prompts = KINDS[kind][0]
    size, group = (8, 12), 4 if kind == "classes" else 1
    filled = [*prompts, *[prompts[-1]] * (-len(prompts) % group)]
    noise = noise_of(11, range(len(filled)), (1, *size))
    exact = torch.float32 if kind == "bfloat16" else torch.float64
    times = torch.ones(1, dtype=exact).expand(len(filled))  # strided as the sampler's: the very same call
    with torch.no_grad():
        velocity = pipe.transformer(
            noise.to(exact).to(pipe.dtype), timesteps_B=times, size=size, **pipe.parts.condition.encode(filled)
        )
    expected = noise.to(exact) - velocity.to(exact)
    pipe.sampler, before = "euler", pipe.scheduler
    try:
        found = pipe(prompts, height=8, width=12, num_inference_steps=1, guidance_scale=1.0, generator=11,
                     output_type="latent").images  # fmt: skip
    finally:
        pipe.scheduler = before
    assert torch.equal(found, expected[: len(prompts)])


def test_what_is_saved_is_an_export_that_the_converter_reads(captions, tmp_path):
    captions.save_pretrained(tmp_path / "saved")
    command = ["tools/convert_checkpoint.py", "import", tmp_path / "saved/transformer", tmp_path / "imported"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    imported = ECDiTPipeline.from_run(tmp_path / "imported")
    for (name, one), other in zip(
        captions.transformer.named_parameters(), imported.transformer.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


# --- what a call does -------------------------------------------------------------------------------------------------

FAST = {"num_inference_steps": 2, "output_type": "latent"}


def test_the_package_has_it_by_name():
    assert megadit.ECDiTPipeline is ECDiTPipeline
    with pytest.raises(AttributeError, match="no attribute 'ECDiTPipelin'"):
        _ = megadit.ECDiTPipelin


def test_output_types_are_the_same_pictures(captions):
    draw = {kind: captions(PROMPTS, generator=1, output_type=kind).images for kind in ("pil", "pt", "np", "latent")}
    assert draw["pt"].shape == (3, 1, 8, 8) and draw["np"].shape == (3, 8, 8, 1)
    assert torch.equal(draw["pt"], (draw["latent"] / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(draw["np"], draw["pt"].permute(0, 2, 3, 1).numpy())
    for picture, exact in zip(draw["pil"], draw["np"], strict=True):
        assert np.abs(np.asarray(picture) - 255 * exact[..., 0]).max() <= 0.5 + 1e-9
    (images,) = captions(PROMPTS, generator=1, output_type="latent", return_dict=False)
    assert torch.equal(images, draw["latent"])


def test_a_seed_or_a_list_is_one_stream_for_each_picture(captions):
    together = captions(PROMPTS, generator=4, **FAST).images
    noise = noise_of(4, range(3), (1, 8, 8))
    assert torch.equal(captions(PROMPTS, latents=noise, generator=9, **FAST).images, together)
    seeds = captions([PROMPTS[0]] * 3, generator=[4, 9, 4], **FAST).images
    torch.testing.assert_close(seeds[0], together[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(seeds[2], seeds[0], rtol=0, atol=1e-12)
    assert (seeds[1] - seeds[0]).abs().max() > 1e-3
    streams = [torch.Generator().manual_seed(i) for i in (4, 9, 4)]
    listed = captions([PROMPTS[0]] * 3, generator=streams, **FAST).images
    torch.testing.assert_close(listed[2], listed[0], rtol=0, atol=1e-12)
    assert (listed[1] - listed[0]).abs().max() > 1e-3


def test_one_generator_draws_the_pictures_in_turn_and_goes_on(captions):
    one, other = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    whole = captions(PROMPTS[0], num_images_per_prompt=3, generator=one, **FAST).images
    parts = [captions(PROMPTS[0], generator=other, **FAST).images for _ in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    first = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(captions(PROMPTS[0], latents=first[None], **FAST).images, parts[0])


def test_without_a_generator_torchs_own_decides(captions):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(captions(PROMPTS[0], **FAST).images)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(captions(PROMPTS[0], **FAST).images, captions(PROMPTS[0], **FAST).images)


def test_a_negative_prompt_is_for_all_or_for_each(captions):
    plain, all_, each, none = (
        captions(PROMPTS, negative_prompt=negative, guidance_scale=4.0, generator=1, **FAST).images
        for negative in (None, "zero", ["zero", "", "zero"], "")
    )
    assert torch.equal(plain, none) and not torch.equal(plain[0], all_[0])
    torch.testing.assert_close(each, torch.stack([all_[0], plain[1], all_[2]]), rtol=0, atol=1e-12)


def test_a_callback_is_called_as_diffusers_calls_it(captions):
    calls = []

    def callback(pipe, step, timestep, kwargs):
        assert pipe is captions and list(kwargs) == ["latents"]
        calls.append((step, float(timestep)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 1 else kwargs

    found = captions(PROMPTS, num_inference_steps=4, output_type="latent", callback_on_step_end=callback).images
    assert calls == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]
    plain = captions(PROMPTS, num_inference_steps=4, output_type="latent", generator=0).images
    assert not torch.equal(found, plain)
    same = captions(PROMPTS[:1], num_inference_steps=4, output_type="latent", callback_on_step_end=callback).images
    torch.testing.assert_close(found[:1], same, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="names 'prompt_embeds'; a callback can have 'latents'"):
        captions(PROMPTS, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_the_sampler_is_chosen_by_name(captions):
    before = captions.scheduler
    try:
        pictures = {}
        for name in ("euler", "heun", "dpm++", "unipc"):
            captions.sampler = name
            assert captions.components["scheduler"].sampler == name
            pictures[name] = captions(PROMPTS, num_inference_steps=5, generator=0, output_type="latent").images
        assert len({images.numpy().tobytes() for images in pictures.values()}) == 4
        with pytest.raises(ValueError, match="sample.sampler='ddim'"):
            captions.sampler = "ddim"
        captions.scheduler = SampleConfig(guidance_from=0.7, guidance_until=0.2)
        with pytest.raises(ValueError, match="guidance_from=0.7 and sample.guidance_until=0.2 must be"):
            captions(PROMPTS)
    finally:
        captions.scheduler = before


def test_it_moves_between_precisions(captions, tmp_path):
    captions.save_pretrained(tmp_path / "saved")
    pipe = ECDiTPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.dtype == torch.float32 and pipe.device == torch.device("cpu")
    single = pipe(PROMPTS, generator=0, **FAST).images
    assert single.dtype == torch.float32
    assert pipe.to("cpu", torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    assert pipe(PROMPTS, generator=0, **FAST).images.dtype == torch.float32
    assert not torch.equal(pipe(PROMPTS, generator=0, **FAST).images, single)


def test_the_progress_bar_can_be_set(captions, capsys):
    captions.set_progress_bar_config(desc="my pictures")
    captions(PROMPTS[0], **FAST)
    assert "my pictures" in capsys.readouterr().err
    captions.set_progress_bar_config(disable=True)
    captions(PROMPTS[0], **FAST)
    assert capsys.readouterr().err == ""


def test_a_size_that_was_not_trained_on_is_warned_of(captions, caplog):
    with caplog.at_level(logging.WARNING, logger="megadit"):
        captions(PROMPTS[0], **FAST)
        assert not caplog.records
        assert captions(PROMPTS[0], height=12, **FAST).images.shape == (1, 1, 12, 8)
    (record,) = caplog.records
    assert record.getMessage() == ("the model was not trained on pictures of 12x8, but of 8x8; expect worse ones")


def test_long_prompts_are_warned_of(captions, caplog):
    with caplog.at_level(logging.WARNING, logger="megadit"):
        captions("a handwritten seven " * 20, **FAST)
    (record,) = caplog.records
    assert "is cut to the 28 tokens" in record.getMessage()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3.5}, "prompt is float; give a str, or a list of them"),
        ({"prompt": ["a", None]}, "prompt is NoneType; give a str"),
        ({"prompt": []}, "no prompts; say what to draw"),
        ({"prompt": ["a", " "]}, "prompt 1 is empty; say what to draw"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts; give one for each, or one for all"),
        ({"negative_prompt": {"a"}}, "negative_prompt is set"),
        ({"height": 9}, "height=9 must be a multiple of 2 pixels: a patch is 2 cells of 1"),
        ({"width": 0}, "width=0 must be a multiple"),
        ({"width": 8.0}, "width=8.0 must be a multiple"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be more than 0"),
        ({"num_inference_steps": "ten"}, "num_inference_steps='ten': input should be a valid integer"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0 must be 0 or more"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2.0 must be between 0 and 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be a whole number of 1 or more"),
        ({"generator": "seed"}, "generator is str; give an int, a torch.Generator, or a list"),
        ({"generator": True}, "generator is bool"),
        ({"generator": [1, 2]}, "generator is a list of 2 for 1 pictures"),
        ({"generator": [torch.Generator(), 2], "num_images_per_prompt": 2}, "generator is a list of Generator, int"),
        ({"latents": torch.zeros(1, 1, 8, 9)}, r"latents are torch.float32 of \[1, 1, 8, 9\]; .* \[1, 1, 8, 8\]"),
        ({"output_type": "jpeg"}, "output_type='jpeg' must be one of pil, pt, np, latent"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_makes_no_sense_is_refused(captions, arguments, message):
    with pytest.raises(ValueError, match=message):
        captions(**{"prompt": PROMPTS[0], **FAST, **arguments})


def test_pictures_that_are_not_finite_are_named(captions, tmp_path):
    captions.save_pretrained(tmp_path / "saved")
    pipe = ECDiTPipeline.from_pretrained(tmp_path / "saved")
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        next(p for name, p in pipe.transformer.named_parameters() if name.startswith("head")).fill_(float("nan"))
    with pytest.raises(NotFinite, match="of 3 pictures 3 are not finite, from step 1 of 2 on: 0 .'a handwritten seven"):
        pipe(PROMPTS, **FAST)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(captions, tmp_path):
    captions.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refused(folder, message, read=ECDiTPipeline.from_pretrained):
    with pytest.raises(ValueError, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


def test_the_folder_is_laid_out_as_diffusers_lays_them_out(saved):
    assert {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()} == {
        *("model_index.json", "scheduler/scheduler_config.json"),
        *("transformer/config.json", "transformer/model.safetensors", "transformer/tokenizer.model"),
    }
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "ECDiTPipeline" and index["transformer"] == ["megadit", "ECDiT"]


def test_what_lacks_or_is_damaged_is_named(saved, tmp_path):
    refused(tmp_path / "nowhere", "there is no such folder")
    broken = tmp_path / "broken"

    def broke(change):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(saved, broken)
        change(broken)
        return broken

    def without_a_tensor(folder):
        path = folder / "transformer/model.safetensors"
        tensors = load_file(path)
        tensors.pop("embed.patch.weight" if "embed.patch.weight" in tensors else sorted(tensors)[0])
        save_file(tensors, path)

    def index(**changes):
        def change(folder):
            path = folder / "model_index.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    refused(broke(lambda f: (f / "model_index.json").unlink()), "has no model_index.json")
    refused(broke(lambda f: (f / "model_index.json").write_text("{")), "model_index.json is damaged: not JSON")
    refused(broke(index(_class_name="FluxPipeline")), "is of FluxPipeline, not of ECDiTPipeline")
    refused(broke(index(sizes=[[8]])), "sizes=.*must be a list of")
    refused(broke(index(vae=["diffusers", "AutoencoderKL"])), "has neither config.json nor vae/config.json")
    refused(broke(without_a_tensor), "does not fit the network of its configuration:\n.*: the source lacks it")
    refused(broke(lambda f: (f / "transformer/tokenizer.model").unlink()), "tokenizer.model: No such file")
    refused(broke(lambda f: (f / "transformer/tokenizer.model").write_bytes(b"x")), "not a sentencepiece model")
    refused(broke(lambda f: shutil.rmtree(f / "transformer")), "transformer does not exist")
    refused(broke(lambda f: shutil.rmtree(f / "scheduler")), "scheduler_config.json cannot be read")
    scheduler = "scheduler/scheduler_config.json"
    refused(broke(lambda f: (f / scheduler).write_text('{"stepps": 3}')), "unknown key sample.stepps; .*sample.steps")
    with pytest.raises(ValueError, match="torch_dtype=torch.int8 must be a floating-point"):
        ECDiTPipeline.from_pretrained(saved, torch_dtype=torch.int8)


def test_a_folder_in_use_stays(captions, saved, tmp_path):
    with pytest.raises(ValueError, match="is there already, and not empty"):
        captions.save_pretrained(saved)
    captions.save_pretrained(saved, overwrite=True)
    (saved / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already, and not empty"):
        captions.save_pretrained(saved, overwrite=True)
    assert (saved / "mine.txt").read_text() == "mine"


def test_a_run_is_read_whole_or_refused(tmp_path, caplog):
    with pytest.raises(ValueError, match="config.yaml"):
        ECDiTPipeline.from_run(tmp_path / "none")
    make_run(tmp_path / "run", "model.conditioning=class", "model.classes=10")
    refused(tmp_path / "run", "it is a run: use ECDiTPipeline.from_run")
    caplog.set_level(logging.WARNING, logger="megadit")
    ECDiTPipeline.from_run(tmp_path / "run")
    assert not caplog.records
    (damaged,) = (tmp_path / "run").glob("checkpoints/step_*/*.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=damaged.name):
        ECDiTPipeline.from_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    refused(tmp_path / "run", "no complete checkpoint; train the run first", ECDiTPipeline.from_run)


def test_weights_without_averages_are_warned_of(tmp_path, caplog):
    tensors = make_run(tmp_path / "run", "model.conditioning=class", "model.classes=10", kinds=("weight",))
    with caplog.at_level(logging.WARNING, logger="megadit"):
        pipe = ECDiTPipeline.from_run(tmp_path / "run")
    (record,) = caplog.records
    assert "holds no averages (ema.*): pictures are drawn with its weights" in record.getMessage()
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, tensors[f"weight.{name}"])


def test_a_configuration_that_was_changed_is_told(tmp_path):
    make_run(tmp_path / "run", "model.conditioning=class", "model.classes=10")
    changed = load_config(tmp_path / "run/config.yaml", ["model.width=36"])
    (tmp_path / "run/config.yaml").write_text(changed.to_yaml())
    refused(tmp_path / "run", "does not fit the network of .*config.yaml", ECDiTPipeline.from_run)
