"""Continuous integration takes turns with the drills: all of them take longer than it may."""

import hashlib
import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With MEGADIT_DRILL_SHARE=0/20, 1/20, ... 19/20 a twentieth of the drills: a test belongs to one by its name."""
    number, of = map(int, os.environ.get("MEGADIT_DRILL_SHARE", "0/1").split("/"))

    def has_its_turn(item: pytest.Item) -> bool:
        return int(hashlib.sha256(item.nodeid.encode()).hexdigest(), 16) % of == number

    left_out = [item for item in items if item.get_closest_marker("drill") and not has_its_turn(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
