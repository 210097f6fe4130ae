"""What continuous integration needs: a test that would end after its time is left out, and named."""

import json
import os
import time
from functools import cache
from pathlib import Path

import pytest

DEADLINE = float(os.environ.get("MEGADIT_TEST_DEADLINE", "inf"))  # seconds since the epoch, from tests/run.sh --rest


@cache
def recorded_seconds() -> dict[str, float]:
    """Seconds of each slow test and drill, as `pytest --store-durations` wrote them."""
    return json.loads(Path(__file__).with_name("durations.json").read_text())


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a test that is left out
def pytest_runtest_setup(item: pytest.Item) -> None:
    if float("inf") > DEADLINE and time.time() + recorded_seconds().get(item.nodeid, 0) > DEADLINE:
        pytest.skip("left out: it would not end within MEGADIT_CI_MINUTES")
