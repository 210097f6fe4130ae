"""Fifty kills at random moments, most of them in the middle of a save: the run goes on as if nothing had happened."""

import random
import time

import pytest

from megadit import checkpoint
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_and_kill, train_on
from tests.training.assembled import CONFIG

STEPS = 160  # more than the lives of a drill come to
COMMAND = ["--config", CONFIG, "run.dtype=float32", "zero.stage=1", "checkpoint.keep=2"]
KILLS = 25


def losses(folder):
    path = folder / METRICS_FILE
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(path)] if path.exists() else []


class Moment:
    """When to kill: some steps after the last kill, and then at a random time of a save, or just at a random time."""

    def __init__(self, folder, chance):
        self.folder, self.chance = folder, chance
        self.resumed = newest_step(folder)  # where this life begins: none of the lines until there may be lost
        self.wanted = len(losses(folder)) + chance.randint(1, 2)
        self.during_save = chance.random() < 0.8
        self.delay = chance.uniform(0, 0.04 if self.during_save else 0.3)
        self.reached = None

    def __call__(self):
        if self.reached is None:
            done = len(losses(self.folder))
            assert done >= self.resumed, f"it began at {done} steps, the newest checkpoint is of step {self.resumed}"
            saving = any((self.folder / "checkpoints").glob("*.partial"))
            if done >= self.wanted and (saving or not self.during_save):
                self.reached = time.monotonic()
        return self.reached is not None and time.monotonic() >= self.reached + self.delay


def newest_step(folder):
    """The step of the newest checkpoint, all of which is there; 0 if there is none."""
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        return 0
    manifest = checkpoint.read_manifest(newest)
    assert checkpoint.load_tensors(newest).keys() == manifest["tensors"].keys()
    return manifest["step"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What each step's line says when nothing happens."""
    folder = tmp_path_factory.mktemp("kills") / "run"
    train_on(2, *COMMAND, f"run.steps={STEPS}", f"checkpoint.every={STEPS}", f"run.dir={folder}")
    return losses(folder)


@pytest.mark.drill
@pytest.mark.parametrize("background", ["false", "true"], ids=["at once", "background"])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(background, expected, tmp_path):
    chance, amid = random.Random(f"kills {background}"), 0
    folder = tmp_path / "run"
    command = [*COMMAND, f"run.dir={folder}", f"checkpoint.async={background}"]
    for kill in range(KILLS):
        # In turn one rank, whichever, and all of them; a checkpoint after each step, or each second one.
        victims = [chance.randrange(2)] if kill % 2 else [0, 1]
        every = f"checkpoint.every={chance.randint(1, 2)}"
        train_and_kill(2, Moment(folder, chance), *command, f"run.steps={STEPS}", every, victims=victims)
        amid += any((folder / "checkpoints").glob("*.partial"))
        assert losses(folder) == expected[: len(losses(folder))], f"kill {kill}"
        assert newest_step(folder) >= len(losses(folder)) - 4, "checkpoints fall behind"
    assert amid >= KILLS // 4, f"only {amid} of {KILLS} kills came amid a save"
    steps = len(losses(folder)) + 3
    results = train_on(2, *command, f"run.steps={steps}")
    assert [status for status, _ in results] == [0, 0]
    assert losses(folder) == expected[:steps]
    assert newest_step(folder) == steps
    assert not [path for path in (folder / "checkpoints").iterdir() if path.suffix in (".partial", ".replaced")]
