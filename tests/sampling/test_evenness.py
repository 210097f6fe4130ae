"""How evenly experts pick patches, against numbers by hand and plain definitions."""

import csv
import json
import math

import numpy as np
import pytest

from megadit.sampling.evenness import Evenness, evenness, printed, table, write_csv, write_json

# Of two steps and two layers; the first layer is even, the second gives one patch nearly all.
EVEN, ONE, TWO = [2, 2, 2, 2], [8, 0, 0, 0], [4, 4, 0, 0]
MAPS = np.array([[EVEN, ONE], [EVEN, TWO]], dtype=np.float32)


def defined(values):
    """By their textbook definitions, over all pairs of patches."""
    count, mean = len(values), sum(values) / len(values)
    gaps = sum(abs(a - b) for a in values for b in values)
    share = [value / sum(values) for value in values if value]
    return Evenness(
        mean=mean,
        most=max(values),
        cv=math.sqrt(sum((value - mean) ** 2 for value in values) / count) / mean,
        gini=gaps / (2 * count**2 * mean),
        unpicked=values.count(0) / count,
        entropy=sum(-part * math.log(part) for part in share) / math.log(count),
    )


def assert_same(found, wanted):
    assert vars(found) == pytest.approx(vars(wanted), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_a_map_are_those_of_the_definitions(seed):
    takers = np.random.default_rng(seed).poisson(1.5, size=48)
    assert_same(evenness(takers), defined(takers.tolist()))


def test_one_patch_with_all_experts_is_as_uneven_as_four_patches_can_be():
    assert_same(evenness(np.array(ONE)), Evenness(2.0, 8.0, math.sqrt(3), 0.75, 0.75, 0.0))
    assert_same(evenness(np.array([5])), Evenness(5.0, 5.0, 0.0, 0.0, 0.0, 1.0))


def test_the_table_has_means_over_steps_and_the_most_uneven_layer_first():
    first, second = table(MAPS, [1, 3])
    assert (first.layer, second.layer) == (3, 1)
    assert_same(first.evenness, Evenness(2.0, 8.0, (math.sqrt(3) + 1) / 2, 0.625, 0.625, 0.25))
    assert_same(second.evenness, Evenness(2.0, 2.0, 0.0, 0.0, 0.0, 1.0))
    assert first.differs is second.differs is None
    assert [row.layer for row in table(np.stack([MAPS[:, 0]] * 3, axis=1), [9, 5, 7])] == [5, 7, 9], "ties by number"


def test_steps_without_a_map_count_nowhere():
    holes = np.stack([MAPS[0], np.full_like(MAPS[0], np.nan)])
    difference = holes - 1
    (first, second) = table(holes, [1, 3], difference)
    assert first.evenness == evenness(np.array(ONE)) and second.evenness == evenness(np.array(EVEN))
    assert (first.differs, second.differs) == ((7 + 3) / 4, 1.0)


def test_what_is_printed_and_written_are_the_same_rows(tmp_path):
    rows = table(MAPS, [1, 3], MAPS - 1)
    head, first, second = printed(rows).splitlines()
    assert head.split() == ["layer", "mean", "most", "cv", "gini", "unpicked", "entropy", "differs"]
    assert first.split() == ["3", "2.00", "8", "1.366", "0.625", "62.5%", "0.250", "2.250"]
    assert second.split() == ["1", "2.00", "2", "0.000", "0.000", "0.0%", "1.000", "1.000"]
    assert len({len(line) for line in (head, first, second)}) == 1

    write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        read = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert read == [row.columns for row in rows]

    holes = MAPS.copy()
    holes[1] = np.nan
    write_json(rows, holes, [1, 3], [1.0, 0.5], {"prompt": "seven"}, tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["prompt"] == "seven" and content["layers"] == read
    assert content["steps"]["3"] == [{"time": 1.0, **vars(evenness(np.array(ONE))), "takers": ONE}, None]
