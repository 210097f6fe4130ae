"""Saving along the way: at once or in the background it is the same run, and a full disk costs only checkpoints."""

import json
import resource
from dataclasses import replace

import pytest

from megadit import checkpoint
from megadit.training.config import load_config
from megadit.training.loop import Unsaved, resume
from megadit.training.metrics import METRICS_FILE, Recorder, read_metrics
from megadit.training.progress import Progress
from tests.ranks import run_ranks, train_on
from tests.tiers import slow_but
from tests.training.assembled import CONFIG, assembled, train_alone
from tests.training.test_metrics import report

ZERO1 = ["run.dtype=float32", "zero.stage=1"]
BACKGROUND = pytest.mark.parametrize("background", ["false", "true"], ids=["at once", "background"])


def steps_kept(folder):
    return [int(path.name.removeprefix("step_")) for path in sorted((folder / "checkpoints").glob("step_*"))]


@pytest.mark.parametrize("overrides", slow_but([[]], [[], ZERO1]), ids=["stage0", "stage1"])
def test_a_run_that_saves_in_the_background_is_the_same_run(overrides, tmp_path):
    """Losses, and every byte of every tensor of every checkpoint."""
    command = ["--config", CONFIG, "run.steps=6", "checkpoint.every=1", "checkpoint.keep=0", "log.sample_every=2"]
    for background in ("false", "true"):
        folder = tmp_path / background
        results = train_on(2, *command, *overrides, f"run.dir={folder}", f"checkpoint.async={background}")
        assert [status for status, _ in results] == [0, 0]
        assert load_config(folder / "config.yaml").checkpoint.async_ == (background == "true")
    at_once, later = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("false", "true"))
    for key in ("loss", "grad_norm", "lr", "routing"):
        assert [line[key] for line in at_once] == [line[key] for line in later]
    assert steps_kept(tmp_path / "false") == steps_kept(tmp_path / "true") == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        one, other = (
            checkpoint.load_tensors(tmp_path / name / "checkpoints" / f"step_{step:08d}") for name in ("false", "true")
        )
        assert one.keys() == other.keys()
        assert all(tensor.numpy().tobytes() == other[name].numpy().tobytes() for name, tensor in one.items())


def test_checkpoints_of_round_steps_stay(tmp_path):
    settings = ["run.steps=7", "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3"]
    train_on(1, "--config", CONFIG, f"run.dir={tmp_path}", *settings)
    assert steps_kept(tmp_path) == [3, 6, 7]


def test_a_checkpoint_says_what_it_is_of_and_holds_nobodys_own_state(tmp_path):
    train_on(2, "--config", CONFIG, f"run.dir={tmp_path}", "run.steps=1", "run.seed=7", *ZERO1)
    manifest = checkpoint.read_manifest(checkpoint.latest(tmp_path / "checkpoints"))
    assert manifest.keys() == {"format", "step", "metadata", "files", "tensors"}
    assert manifest["step"] == 1
    assert manifest["metadata"].keys() == {"config", "megadit", "progress"}
    assert manifest["metadata"]["config"] == json.loads(json.dumps(load_config(tmp_path / "config.yaml").to_dict()))
    assert manifest["metadata"]["config"]["run"]["seed"] == 7
    names = {tuple(name.split(".", 1)) for name in manifest["tensors"]}
    parameters = {name for _, name in names}
    kinds = ("weight", "master", "exp_avg", "exp_avg_sq", "ema")
    assert names == {(kind, name) for kind in kinds for name in parameters}


class Without:
    """A loader before which the disk is full, on these ranks, from one step until another.

    `step` is about to be made when its batch is asked for: what the disk has room for changes between two saves.
    """

    def __init__(self, run, ranks, begin, end):
        self.run, self.concerned, self.begin, self.end = run, run.process.rank in ranks, begin, end
        self.free = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batch(self, step):
        self.run.saver.wait()
        if self.concerned and step == self.begin:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, self.free[1]))  # a rank has more than a megabyte
        if step == self.end:
            self.give_room()
        return self.run.loader.batch(step)

    def give_room(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.free)


def train_on_a_full_disk(rank, world_size, overrides, ranks, begin, end):
    """How the training ends, and the checkpoints that it leaves; then it goes on, with room."""
    settings = ["log.every=1", "checkpoint.every=2", "checkpoint.keep=0"]
    run = assembled(rank, world_size, *settings, *overrides)
    loader = Without(run, ranks, begin, end)
    ending = "finished"
    try:
        train_alone(replace(run, loader=loader), Progress())
    except Unsaved as error:
        ending = str(error)
    finally:
        loader.give_room()
    left = steps_kept(run.config.directory), sorted(path.name for path in run.config.directory.glob("checkpoints/*"))
    again = assembled(rank, world_size, *settings, *overrides)
    start = resume(again)
    if start.step < again.config.run.steps:
        train_alone(again, start)
    return ending, left, start.step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving") / "run"
    train_on(2, "--config", CONFIG, "run.steps=8", f"run.dir={folder}", *ZERO1)
    return read_metrics(folder / METRICS_FILE)


@BACKGROUND
@pytest.mark.parametrize("ranks", slow_but([[1]], [[0], [1]]), ids=["rank 0", "rank 1"])
def test_on_a_full_disk_training_goes_on_and_saves_again_when_there_is_room(
    ranks, background, undisturbed, tmp_path, capfd
):
    overrides = [*ZERO1, "run.steps=8", f"run.dir={tmp_path}", f"checkpoint.async={background}"]
    results = run_ranks(train_on_a_full_disk, 2, overrides, ranks, 3, 7)
    for ending, (steps, names), start in results:
        assert ending == "finished"
        assert steps == [2, 8], "the steps 4 and 6 found no room"
        assert names == ["latest", "step_00000002", "step_00000008"]
        assert start == 8
    lines = read_metrics(tmp_path / METRICS_FILE)
    for key in ("step", "loss", "grad_norm"):
        assert [line[key] for line in lines] == [line[key] for line in undisturbed]


@BACKGROUND
def test_when_the_last_save_fails_the_run_says_so_and_can_go_on(background, undisturbed, tmp_path):
    overrides = [*ZERO1, "run.steps=8", f"run.dir={tmp_path}", f"checkpoint.async={background}"]
    for ending, (steps, names), start in run_ranks(train_on_a_full_disk, 2, overrides, [1], 7, 9):
        assert "step 8 is done, but its checkpoint was not saved" in ending and str(tmp_path) in ending
        assert (steps, start) == ([2, 4, 6], 6)
        assert names == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    assert steps_kept(tmp_path) == [2, 4, 6, 8]
    lines = read_metrics(tmp_path / METRICS_FILE)
    for key in ("step", "loss", "grad_norm"):
        assert [line[key] for line in lines] == [line[key] for line in undisturbed]


@BACKGROUND
def test_the_command_ends_with_a_status_and_one_message_for_each_save(background, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").parent.mkdir(parents=True)
    (folder / "checkpoints").write_text("no folder")
    command = ["--config", CONFIG, "run.steps=2", "checkpoint.every=1", f"run.dir={folder}"]
    results = train_on(2, *command, f"checkpoint.async={background}")
    assert [status for status, _ in results] == [3, 3]
    errors, others = (text for _, text in results)
    for step in (1, 2):
        assert errors.count(f"the checkpoint of step {step} was not saved in {folder / 'checkpoints'}: rank 0: ") == 1
    assert errors.count("File exists") == 2
    assert errors.count("step 2 is done, but its checkpoint was not saved; make room for it and start again") == 1
    assert "not saved" not in others
    assert [line["step"] for line in read_metrics(folder / METRICS_FILE)] == [1, 2]


def test_metrics_wait_for_room(tmp_path, caplog):
    recorder, free = Recorder(tmp_path, 0, 6, tensorboard=False), resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / METRICS_FILE
    recorder.record(report(1))
    limit = path.stat().st_size * 3 // 2  # amid the second line
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
        for step in (2, 3, 4):
            recorder.record(report(step))
            assert path.stat().st_size == limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    recorder.record(report(5))
    recorder.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: [Errno 27] File too large; its lines wait for room"
    ]


# --- what another engine, or another tool, has saved ------------------------------------------------------------------

STAGES = {
    "stage0": ["run.dtype=float32", "zero.stage=0"],
    "zero1_bf16": ["run.dtype=bfloat16", "zero.stage=1"],
}


def resumed_weights(rank, world_size, overrides):
    run = assembled(rank, world_size, *overrides)
    assert resume(run).step == 2
    return {name: parameter.detach().float().numpy().copy() for name, parameter in run.named}


@pytest.mark.parametrize(("before", "after"), [("zero1_bf16", "stage0"), ("stage0", "zero1_bf16")])
def test_masters_carry_a_run_into_another_precision(before, after, tmp_path):
    """float32 weights, or float32 masters: the same numbers, and the parameters follow from them."""
    command = ["--config", CONFIG, f"run.dir={tmp_path}", "run.steps=2", *STAGES[before]]
    train_on(1, *command)
    saved = checkpoint.load_tensors(checkpoint.latest(tmp_path / "checkpoints"))
    (weights,) = run_ranks(resumed_weights, 1, [f"run.dir={tmp_path}", *STAGES[after]])
    for name, found in weights.items():
        exact = saved[f"master.{name}" if before.startswith("zero") else f"weight.{name}"]
        expected = exact.bfloat16().float() if after.endswith("bf16") else exact
        assert found.tobytes() == expected.numpy().tobytes(), name


def test_another_precision_without_masters_is_refused_by_name(tmp_path):
    command = ["--config", CONFIG, f"run.dir={tmp_path}"]
    train_on(1, *command, "run.steps=2")  # float64
    ((status, errors),) = train_on(1, *command, "run.steps=4", *ZERO1)
    assert status == 2
    assert "torch.float64 in the checkpoint, torch.float32 here" in errors


def keep_weights(rank, world_size, path):
    """Replace the checkpoint by one of its weights alone, as a conversion writes it."""
    weights = checkpoint.load_tensors(path, prefix="weight.")
    logical = {
        name: checkpoint.LogicalTensor(tuple(t.shape), t.dtype, (checkpoint.Piece((0,) * t.ndim, t),))
        for name, t in weights.items()
    }
    checkpoint.save(path.parent, 2, logical, checkpoint.read_manifest(path)["metadata"])


def test_weights_alone_cannot_be_gone_on_from(tmp_path):
    command = ["--config", CONFIG, f"run.dir={tmp_path}"]
    train_on(1, *command, "run.steps=2")
    path = checkpoint.latest(tmp_path / "checkpoints")
    run_ranks(keep_weights, 1, path)
    for results in (train_on(2, *command, "run.steps=4"), train_on(1, *command, "run.steps=4", *ZERO1)):
        assert {status for status, _ in results} == {2}
        message = results[0][1]
        assert f"{path} holds weights alone" in message and f"run.init_from={path}" in message
        assert message.count("megadit: ") == 1
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 2
