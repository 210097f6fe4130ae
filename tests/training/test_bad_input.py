"""Bad input: one clear message from one rank, exit status 2, nothing written."""

import numpy as np
import pytest

from tests.commands import run_python
from tests.ranks import train_on

CONFIG = "tests/configs/tiny.yaml"


def refused(tmp_path, world_size, *argv):
    """The one message of a start that was refused."""
    before = sorted(tmp_path.rglob("*"))
    results = train_on(world_size, *argv, f"run.dir={tmp_path / 'run'}")
    assert [status for status, _ in results] == [2] * world_size
    spoken = [errors for _, errors in results if errors]
    assert len(spoken) == 1, "exactly one rank speaks"
    assert spoken[0].count("\n") == 1, f"one line, not {spoken[0]!r}"
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    return spoken[0]


CASES = {
    "unknown key": (
        1,
        ["optim.learning_rate=1"],
        ["unknown key optim.learning_rate", "the nearest is optim."],
    ),
    "misspelt key": (2, ["model.expert=8"], ["unknown key model.expert;", "the nearest is model.experts"]),
    "unknown section": (1, ["modle.width=8"], ["unknown section modle", "the nearest is model"]),
    "unknown preset": (
        1,
        ["model.preset=ec-dit-m-32e"],
        ["unknown model.preset ec-dit-m-32e", "the nearest is ec-dit-"],
    ),
    "not an override": (1, ["optim.lr"], ["'optim.lr' is not of the form section.key=value"]),
    "override of no YAML": (1, ["optim.betas=[0.9"], ["'optim.betas=[0.9'", "not valid YAML"]),
    "wrong type": (1, ["run.steps=many"], ["run.steps='many'", "valid integer"]),
    "wrong choice": (1, ["run.dtype=float16"], ["run.dtype='float16'", "'bfloat16', 'float32' or 'float64'"]),
    "not positive": (1, ["data.global_batch=0"], ["data.global_batch=0 must be more than 0"]),
    "negative": (1, ["model.experts=-4"], ["model.experts=-4 must be 0 or more"]),
    "not a number": (1, ["optim.lr=.nan"], ["optim.lr=nan must be 0 or more"]),
    "a list for a name": (1, ["model.preset=[a]"], ["unknown model.preset ['a']"]),
    "betas": (1, ["optim.betas=[0.9,1.5]"], ["optim.betas[1]=1.5 must be at least 0 and less than 1"]),
    "average": (2, ["ema.decay=2"], ["ema.decay=2.0 must be at least 0 and less than 1"]),
    "dropout": (1, ["objective.caption_dropout=5"], ["objective.caption_dropout=5.0 must be between 0 and 1"]),
    "rescaling": (1, ["sample.guidance_rescale=1.5"], ["sample.guidance_rescale=1.5 must be between 0 and 1"]),
    "no interval": (
        1,
        ["sample.guidance_from=0.6", "sample.guidance_until=0.3"],
        ["sample.guidance_from=0.6 and sample.guidance_until=0.3 must be times between 0", "the first of them lower"],
    ),
    "beyond the noise": (1, ["sample.guidance_until=2"], ["sample.guidance_until=2.0 must be times between 0"]),
    "sampler": (1, ["sample.sampler=ddim"], ["sample.sampler='ddim'", "'dpm++' or 'unipc'"]),
    "no pictures": (1, ["log.samples=0"], ["log.samples=0 must be more than 0"]),
    "short captions": (1, ["text.length=2"], ["text.length=2 has no room", "use 3 or more"]),
    "no spread": (1, ["text.init_std=0"], ["text.init_std=0.0 is the spread", "use a number above 0"]),
    "batch of no size": (
        2,
        ["parallel.pipeline=2", "data.global_batch=15", "data.micro_batch=0"],
        ["data.global_batch=15 is not a multiple of 1 data-parallel ranks x 2 pipeline stages", "that is: 16"],
    ),
    "tensor": (
        3,
        ["parallel.tensor=3"],
        ["parallel.tensor=3 does not divide", "model.heads=4", "model.experts=4", "use 1, 2 or 4"],
    ),
    "tensor and heads": (
        4,
        ["parallel.tensor=4", "model.kv_heads=2", "model.experts=6"],
        ["parallel.tensor=4 does not divide model.kv_heads=2 and model.experts=6; use 1 or 2"],
    ),
    "expert": (
        3,
        ["parallel.expert=3", "data.global_batch=12"],
        ["parallel.expert=3 times parallel.tensor=1 does not divide model.experts=4", "parallel.expert=1, 2 or 4"],
    ),
    "expert of a model without layers that have any": (
        2,
        ["parallel.expert=2", "model.dense_first=4"],
        ["the model is dense (model.routing, model.moe_every, model.dense_first)", "parallel.expert=1"],
    ),
    "expert of a dense model": (2, ["parallel.expert=2", "model.experts=0"], ["model.experts=0", "parallel.expert=1"]),
    "pipeline": (1, ["parallel.pipeline=5"], ["parallel.pipeline=5", "model.layers=4"]),
    "pipeline of several stages a rank": (
        2,
        ["parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.stages_per_rank=3"],
        ["parallel.pipeline=2 x 3 stages per rank cannot be filled by model.layers=4", "use at most 1"],
    ),
    "V of too few layers": (
        1,
        ["parallel.schedule=zbv", "model.layers=1", "model.experts=0"],
        ["parallel.pipeline=1 x 2 stages per rank", "model.layers=1", "parallel.schedule=1f1b"],
    ),
    "recompute under zbv": (
        2,
        ["parallel.pipeline=2", "parallel.schedule=zbv", "run.recompute=moe"],
        ["run.recompute=moe would run again", "run.recompute=none", "parallel.schedule=1f1b or interleaved"],
    ),
    "ZeRO-2 under zbv": (
        2,
        ["parallel.pipeline=2", "parallel.schedule=zbv", "zero.stage=2", "run.dtype=float32"],
        ["zero.stage=2", "zbv", "zero.stage=1"],
    ),
    "compiled under zbv": (
        2,
        ["parallel.pipeline=2", "parallel.schedule=zbv", "run.compile=true"],
        ["run.compile=true cannot split", "run.compile=false"],
    ),
    "rounds": (
        2,
        ["parallel.pipeline=2", "parallel.schedule=interleaved", "data.global_batch=10", "data.micro_batch=2"],
        ["5 microbatches in 2 equal rounds", "a multiple of 2 microbatches"],
    ),
    "masters": (1, ["run.dtype=bfloat16"], ["run.dtype=bfloat16 needs the float32 masters of ZeRO", "zero.stage=1"]),
    "unknown way to route": (
        1,
        ["model.routing_preset=nucleus-image"],
        ["unknown model.routing_preset nucleus-image", "the nearest is nucleus"],
    ),
    "balance of experts that choose": (
        1,
        ["model.balance_loss=0.1"],
        ["model.balance_loss=0.1 is for token choice", "model.routing=token_choice"],
    ),
    "normalised gates of any sign": (
        1,
        ["model.normalise_gates=true", "model.gate=identity"],
        ["model.normalise_gates=true divides", "model.gate=softmax or sigmoid"],
    ),
    "more choices than experts": (
        1,
        ["model.routing=token_choice", "model.top_k=5"],
        ["model.top_k=5", "model.experts=4"],
    ),
    "capacity of a dense layer": (
        1,
        ["model.capacity_overrides={0: 2.0}"],
        ["model.capacity_overrides names layer 0", "layers with experts: 1 or 3"],
    ),
    "no capacity": (1, ["model.capacity_overrides={1: -1}"], ["model.capacity_overrides[1]=-1.0 must be more than 0"]),
    "compiled without a capacity": (
        1,
        ["run.compile=true", "model.routing=token_choice", "model.dropless=true"],
        ["run.compile=true needs fixed shapes", "model.dropless=false"],
    ),
    "group": (1, ["model.routing_group=0"], ["model.routing_group=0 must be sample, batch, or a number"]),
    "group of a microbatch": (
        2,
        ["model.routing_group=3"],
        ["model.routing_group=3 does not divide the 4 images", "use 1, 2 or 4", "data.micro_batch"],
    ),
    "group without a size": (
        2,
        ["model.routing_group=batch", "data.micro_batch=0"],
        ["set data.micro_batch", "8 here"],
    ),
    "shared experts": (
        2,
        ["parallel.tensor=2", "model.shared_experts=1", "model.shared_ratio=0.65625"],
        ["parallel.tensor=2 does not divide the shared experts' hidden width=21; use 1"],
    ),
    "classes": (1, ["model.conditioning=class"], ["model.conditioning=class needs model.classes"]),
    "embedders of a shared modulation": (
        1,
        ["model.modulation=shared", "model.embedders=per_layer"],
        ["model.modulation=shared reads one conditioning", "use model.embedders=shared"],
    ),
    "captions as states": (
        1,
        ["text.kind=states"],
        ["text.kind=precomputed reads", "data.kind=digits does not have", "text.kind=builtin"],
    ),
    "a pooled vector of nobody": (
        1,
        ["text.pooled=12"],
        ["text.pooled=12 is the width of CLIP's vector", "text.kind=builtin does not have", "text.pooled=0"],
    ),
    "a pooled vector beside many embedders": (
        1,
        ["text.pooled=12", "text.kind=precomputed", "model.embedders=per_layer"],
        ["text.pooled=12 joins the one conditioning", "use model.embedders=shared"],
    ),
    "a learned variance": (
        2,
        ["model.out_channels=6"],
        ["model.out_channels=6 is not model.channels=1", "use model.out_channels=0"],
    ),
    "world": (3, ["parallel.tensor=2"], ["parallel.tensor=2", "does not divide the 3 processes"]),
    "world too small": (1, ["parallel.pipeline=2"], ["pipeline=2", "does not divide the 1 processes"]),
    "batch": (
        2,
        ["data.global_batch=20", "data.micro_batch=4"],
        ["data.global_batch=20 is not a multiple of 2 data-parallel ranks x data.micro_batch=4", "that is: 16"],
    ),
    "microbatches": (
        4,
        ["parallel.pipeline=4", "data.micro_batch=8"],
        ["2 microbatches for parallel.pipeline=4 stages", "data.micro_batch=1, 2 or 4"],
    ),
    "heads": (1, ["model.kv_heads=3"], ["model.kv_heads=3 does not divide model.heads=4; use 1, 2 or 4"]),
    "patch": (1, ["model.patch=3"], ["model.patch=3 does not divide model.image_size=8; use 1, 2, 4 or 8"]),
    "heads that cannot turn": (
        1,
        ["model.positions=rotary", "model.head_width=6"],
        ["model.head_width=6 is not a multiple of 4", "model.positions=sincos"],
    ),
    "no tokens": (1, ["objective.keep_tokens=0"], ["objective.keep_tokens=0.0 must be more than 0"]),
    "more than all tokens": (1, ["objective.keep_tokens=1.5"], ["objective.keep_tokens=1.5 must be", "at most 1"]),
    "tokens over ranks": (
        2,
        ["parallel.tensor=2", "parallel.sequence=true", "objective.keep_tokens=0.44"],
        ["parallel.tensor=2 does not divide the tokens kept in training (objective.keep_tokens)=7; use 1"],
    ),
    "precision": (1, ["zero.stage=1"], ["zero.stage=1 keeps float32 masters", "zero.stage=0"]),
    "image size": (
        1,
        ["model.image_size=16"],
        ["images of 1 x 8 x 8", "expects 1 x 16 x 16", "model.image_size=8"],
    ),
    "vocabulary": (1, ["text.vocabulary=10"], ["text.vocabulary=10 cannot hold the captions' pieces"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_configurations_are_refused(case, tmp_path):
    world_size, overrides, expected = CASES[case]
    message = refused(tmp_path, world_size, "--config", CONFIG, *overrides)
    for part in expected:
        assert part in message


def test_a_missing_configuration_is_named(tmp_path):
    message = refused(tmp_path, 2, "--config", str(tmp_path / "none.yaml"))
    assert f"{tmp_path / 'none.yaml'}: No such file" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "config"),
        (b"just words", "expected sections"),
        (b"run: 3", "section run must hold keys"),
    ],
)
def test_an_unreadable_configuration_is_named(content, expected, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = refused(tmp_path, 1, "--config", str(path))
    assert str(path) in message
    assert expected in message


def test_a_missing_tokenizer_is_named(tmp_path):
    path = tmp_path / "none.model"
    assert f"{path}: No such file" in refused(tmp_path, 1, "--config", CONFIG, f"text.tokenizer={path}")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "wrong.model"
    path.write_bytes(b"not sentencepiece")
    message = refused(tmp_path, 1, "--config", CONFIG, f"text.tokenizer={path}")
    assert f"{path}: not a sentencepiece model" in message


def arrays(path, **kwargs):
    np.savez(path, **kwargs)
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path, "No such file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 but cut short") and path, "not a readable .npz"),
        (lambda path: path.write_bytes(b"words") and path, "not a readable .npz"),
        (lambda path: np.save(path.open("wb"), np.zeros((4, 8, 8))) or path, "not a readable .npz"),
        (lambda path: arrays(path, images=np.zeros((4, 8, 8)), captions=np.array("a")), "captions ()"),
        (lambda path: arrays(path, images=np.zeros(()), captions=np.array(["a"])), "images ()"),
        (lambda path: arrays(path, images=np.zeros((4, 8, 8)), captions=np.full((4, 2), "a")), "captions (4, 2)"),
        (lambda path: arrays(path, images=np.zeros((1, 8, 8)), captions=np.array(["a"])), "1 samples; at least 2"),
        (
            lambda path: arrays(path, images=np.full((2, 8, 8), np.nan), captions=np.array(["a", "b"])),
            "NaN or infinity",
        ),
        (lambda path: arrays(path, images=np.full((2, 8, 8), 255), captions=np.array(["a", "b"])), "reach 255; scale"),
        (lambda path: arrays(path, images=np.zeros((4, 8, 6)), captions=np.array(["abc d"] * 4)), "only square images"),
        (lambda path: arrays(path, images=np.zeros((4, 8, 8))), "the arrays needed are images and captions"),
        (lambda path: arrays(path, images=np.zeros((4, 8, 8)), captions=np.array(["a"] * 3)), "captions (3,)"),
        (lambda path: arrays(path, images=np.zeros((2, 8, 8)), captions=np.array(["a", " "])), "1 captions are empty"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_named(make, expected, tmp_path):
    path = make(tmp_path / "data.npz")
    message = refused(tmp_path, 1, "--config", CONFIG, "data.kind=arrays", f"data.path={path}")
    assert str(path) in message
    assert expected in message


def contents(folder):
    """Every file of a run but the lock, which says who was there last."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path):
    folder = tmp_path / "run"
    command = ["--config", CONFIG, f"run.dir={folder}", "run.steps=2", "checkpoint.every=1"]
    train_on(1, *command)
    (damaged,) = (folder / "checkpoints" / "step_00000002").glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = contents(folder)
    ((status, errors),) = train_on(1, *command, "run.steps=4")
    assert status == 2
    assert str(damaged) in errors
    assert contents(folder) == before


def test_a_checkpoint_of_another_model_names_the_tensor(tmp_path):
    command = ["--config", CONFIG, f"run.dir={tmp_path / 'run'}", "run.steps=2"]
    train_on(1, *command)
    ((status, errors),) = train_on(1, *command, "run.steps=4", "model.ffn_ratio=2")
    assert status == 2
    assert "blocks.0.feedforward.up.weight" in errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_on(1, "--config", CONFIG, f"run.dir={folder}", "run.steps=1")
    return folder


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt_is_refused(prompt, trained, tmp_path):
    out = tmp_path / "picture.png"
    done = run_python("tools/sample.py", trained, "a handwritten one", prompt, "--out", out)
    assert done.returncode == 2
    assert done.stderr == "sample: prompt 1 is empty; say what to draw\n"
    assert not out.exists()


def test_sampling_from_a_folder_without_a_run_is_refused(tmp_path):
    done = run_python("tools/sample.py", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / 'config.yaml'}: No such file" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    results = train_on(2, "--config", CONFIG, f"run.dir={blocked / 'run'}")
    assert [status for status, _ in results] == [2, 2]
    assert f"run.dir={blocked / 'run'} cannot be written: Not a directory" in results[0][1]
