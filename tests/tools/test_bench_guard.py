"""tools/bench_guard.py measures on processes of its own."""

import pytest

from tests.lost_ranks import CONFIG
from tools.bench_guard import GUARDS, Setting, measure


@pytest.mark.slow
def test_every_guard_is_measured_in_pairs():
    rows = measure(Setting(CONFIG, ranks=2, rounds=2, steps=1))
    assert [row.name for row in rows] == list(GUARDS)
    for row in rows:
        assert len(row.without) == len(row.guarded) == len(row.inside) == 2
        assert all(0 < inside < step for inside, step in zip(row.inside, row.guarded, strict=True))
        assert row.name in row.text()
