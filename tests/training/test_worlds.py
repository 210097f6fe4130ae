"""A run whose world shrinks and grows again goes on by the same command, with the same samples in the same order."""

import json

import pytest

from megadit.training.events import EVENTS_FILE
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.ranks import train_on

COMMAND = [
    *("--config", "tests/configs/tiny.yaml", "run.dtype=float32", "zero.stage=1", "log.sample_ids=true"),
    *("data.micro_batch=0", "optim.eps=1e-5"),
]
# On 8 processes tensor 2 x pipeline 2 x expert 2, on 4 the first of the others that fits.
LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"]
FALLBACKS = "parallel.fallbacks=[{tensor: 4, expert: 4}, {pipeline: 1}, {tensor: 1, pipeline: 1, expert: 2}]"


def of_worlds(folder, *lives):
    """Train in one world after the other: (processes, steps), the same command otherwise."""
    for world_size, steps in lives:
        results = train_on(world_size, *COMMAND, *LAYOUT, FALLBACKS, f"run.steps={steps}", f"run.dir={folder}")
        assert [status for status, _ in results] == [0] * world_size, results[0][1]
    return read_metrics(folder / METRICS_FILE)


def layouts(folder):
    """What each life began with."""
    lines = [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]
    return [tuple(line["layout"].values()) for line in lines if line["event"] in ("start", "resume")], [
        line["reason"] for line in lines if line["event"] == "layout"
    ]


def assert_same_course(found, expected):
    assert [line["sample_ids"] for line in found] == [line["sample_ids"] for line in expected]
    assert [line["sample_ids"] for line in found] == [list(range(16 * i, 16 * i + 16)) for i in range(len(found))]
    for key in ("loss", "grad_norm"):
        values = [line[key] for line in expected]
        assert [line[key] for line in found] == pytest.approx(values, rel=2e-5, abs=0)


@pytest.mark.slow
def test_a_world_of_four_goes_on_as_two_and_as_four_again(tmp_path):
    expected = of_worlds(tmp_path / "straight", (4, 6))
    found = of_worlds(tmp_path / "moved", (4, 2), (2, 4), (4, 6))
    assert_same_course(found, expected)
    begun, told = layouts(tmp_path / "moved")  # (pp, edp, ep, tp)
    assert begun == [(1, 1, 2, 2), (1, 1, 2, 1), (1, 1, 2, 2)]
    assert len(told) == 3 and "does not fit 2 processes" in told[1]


@pytest.mark.drill
def test_a_world_of_eight_goes_on_as_four_and_as_eight_again(tmp_path):
    expected = of_worlds(tmp_path / "straight", (8, 12))
    found = of_worlds(tmp_path / "moved", (8, 4), (4, 8), (8, 12))
    assert_same_course(found, expected)
    begun, told = layouts(tmp_path / "moved")
    assert begun == [(2, 1, 2, 2), (1, 1, 2, 2), (2, 1, 2, 2)]
    assert len(told) == 1 and "does not fit 4 processes" in told[0]


def test_where_nothing_fits_each_layout_says_why(tmp_path):
    results = train_on(3, *COMMAND, *LAYOUT, FALLBACKS, f"run.dir={tmp_path / 'run'}")
    assert [status for status, _ in results] == [2] * 3
    (message,) = [told for _, told in results if told]
    assert "= 8 does not divide the 3 processes" in message
    assert "parallel.fallbacks[0]: parallel.tensor=4 x" in message or "parallel.fallbacks[0]: " in message
    assert "parallel.fallbacks[2]: " in message and "= 2 does not divide the 3 processes" in message
    assert not (tmp_path / "run").exists()
