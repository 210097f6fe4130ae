"""Models to play with: of captions, trained for a few steps, and of classes, of random weights."""

import pytest

from tests.conversion.made import make_run
from tests.playground.opened import opened
from tests.ranks import train_on


@pytest.fixture(scope="session")
def captions(tmp_path_factory):
    """A run of captions with experts, in grey."""
    folder = tmp_path_factory.mktemp("playground") / "captions <b>"
    overrides = ["run.steps=30", "optim.lr=0.01", "ema.decay=0.9"]
    assert train_on(1, "--config", "tests/configs/tiny.yaml", f"run.dir={folder}", *overrides)[0][0] == 0
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A run of classes without experts, in colour."""
    folder = tmp_path_factory.mktemp("playground") / "dense"
    make_run(folder, "model.conditioning=class", "model.classes=10", "model.channels=3", "model.experts=0")
    return folder


@pytest.fixture(scope="session")
def place(captions):
    """A playground of the captions."""
    with opened(captions) as place:
        yield place
