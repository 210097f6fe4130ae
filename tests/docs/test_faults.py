"""docs/faults.md names tests that there are."""

import re
from pathlib import Path

import pytest

PAGE = Path("docs/faults.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


@pytest.mark.parametrize(("path", "test"), NAMED)
def test_a_test_of_the_table_exists(path, test):
    source = Path(path).read_text()
    assert f"def {test}(" in source if test else "def test_" in source


def test_every_fault_has_a_test():
    rows = PAGE.split("| fault | what happens | test |\n|---|---|---|\n")[1].splitlines()
    assert len(rows) > 30
    assert all(row.count("|") == 4 and "`tests/" in row.rsplit("|", 2)[1] for row in rows)
