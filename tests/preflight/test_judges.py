"""Judging is a function of what the ranks found: outliers are named, healthy ranks are not."""

import math

import pytest
import torch

from megadit.preflight import bandwidth, compute, memory, parity, versions
from megadit.preflight.station import Member, Settings, Station
from megadit.runtime.launch import Process
from tests.preflight.planted import settings


@pytest.fixture
def station():
    members = [Member(rank, f"host{rank // 2}", "cpu") for rank in range(4)]
    return Station(Process(0, 4, 0, torch.device("cpu")), settings(4, "tensor=2", "expert=2"), members)


def test_a_rank_must_be_slow_in_every_round(station):
    def found(*rounds):
        return [{compute.PRODUCTS: [1.0, 1.0], compute.STEP: times} for times in ([2.0, 2.0], [2.1, 2.0], *rounds)]

    assert not compute.judge(station, found([2.0, 9.0], [9.0, 2.0])).faults, "once each: noise"
    (fault,) = compute.judge(station, found([3.2, 3.1], [2.0, 2.0])).faults
    assert "rank 2 (host1, cpu)" in fault and "1.55 times" in fault


def test_two_ranks_are_compared_with_the_faster_one(station):
    assert compute.slowness([[1.0], [2.0]]) == [1.0, 2.0]


def test_memory_that_is_less_than_the_others_is_named(station):
    def found(*free):
        return [{"free": each, "total": 8e9, "host_free": 9e9, "wrong": {}, "size": 2**20} for each in free]

    assert not memory.judge(station, found(4e9, 3.9e9, 4.2e9, 3.3e9)).faults
    (fault,) = memory.judge(station, found(4e9, 3.9e9, 4.2e9, 1e9)).faults
    assert fault.startswith("rank 3 (host1, cpu) has 0.9 GiB free of 7.5")


@pytest.mark.parametrize("size", [4, 4000, 2**20])
def test_memory_that_works_keeps_the_pattern(size, monkeypatch):
    monkeypatch.setattr(memory, "WORDS", 1000)
    assert memory.try_pattern(size, torch.device("cpu")) is None
    words = torch.empty(100, dtype=torch.int32)
    memory.fill(words, 50)
    assert len(words.unique()) == 100, "every place has its value"
    words[7], words[8] = words[8].item(), words[7].item()
    assert memory.differing(words, 50, flipped=False) == (2, 57)


def test_versions_of_the_majority_are_right_and_other_pins_a_warning(station, monkeypatch):
    monkeypatch.setattr(versions, "pins", lambda: {"torch": "2.0.0", "numpy": "1.0"})

    def found(*torches):
        return [{"versions": {"torch": each, "numpy": "1.0"}, "environment": {}} for each in torches]

    verdict = versions.judge(station, found("2.0.0+cpu", "2.0.0+cpu", "1.9", "2.0.0+cpu"))
    assert verdict.faults == ["torch is 1.9 on rank 2 (host1, cpu); 2.0.0+cpu on 3 ranks"] and not verdict.warnings
    verdict = versions.judge(station, found(*["2.1.0"] * 4))
    assert not verdict.faults
    assert verdict.warnings == ["torch is 2.1.0, requirements.txt pins 2.0.0: not what the tests ran with"]


def test_the_source_hash_is_of_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = versions.source_hash(tmp_path)
    assert before == versions.source_hash(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    changed = versions.source_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({before, changed, versions.source_hash(tmp_path)}) == 3


def test_bus_bandwidth_does_not_depend_on_the_size_of_the_group():
    def row(collective, ranks):
        return bandwidth.Row("", "tp", list(range(ranks)), collective, 10**9, [1.0, 2.0, 3.0])

    assert row("all-reduce", 4).algorithm_bandwidth == 0.5e9
    assert row("all-reduce", 4).bus_bandwidth == 0.75e9 and row("all-reduce", 2).bus_bandwidth == 0.5e9
    assert row("all-gather", 4).bus_bandwidth == 0.375e9 and row("send", 4).bus_bandwidth == 0.5e9


def trained(alone=(1.0, 2.0), tensor=(1.0, 2.0), expert=(1.0, 2.0), sharded=(1.0, 2.0)):
    exact, rounded = parity.EXACT, parity.SHARDED
    layouts = {
        "tensor 2 x data 2": {exact: list(tensor), rounded: list(sharded)},
        "expert 2 x data 2": {exact: list(expert), rounded: [1.0, 2.0]},
    }
    return {"alone": {exact: list(alone), parity.WHOLE: [1.0, 2.0]}, "layouts": layouts}


@pytest.mark.parametrize(
    ("odd", "faults"),
    [
        ({"expert": (1.0, 2.0 + 1e-8)}, ["expert 2 x data 2 in float64 differs from one process by 5.0e-09"]),
        ({"tensor": (math.nan, 2.0)}, ["tensor 2 x data 2 in float64 differs from one process by inf"]),
        ({"sharded": (1.0001, 2.0)}, ["tensor 2 x data 2 in float32, ZeRO-1 differs from one process by 1.0e-04"]),
        ({"alone": (1.0, 2.1)}, ["rank 3 (host1, cpu) trains otherwise than the other ranks when each trains alone"]),
    ],
)
def test_a_layout_or_a_device_that_trains_otherwise_is_named(station, odd, faults):
    assert not parity.judge(station, [trained(sharded=(1.00001, 2.0))] * 4).faults, "float32"
    found = parity.judge(station, [trained(), trained(), trained(), trained(**odd)]).faults
    assert len(found) == len(faults)
    for fault, expected in zip(found, faults, strict=True):
        assert fault.startswith(expected) and "rank 3 (host1, cpu)" in fault and "rank 0" not in fault


def test_layouts_share_one_model_that_all_can_cut():
    layouts = settings(16, "tensor=2,expert=4", "pipeline=8,schedule=zbv", "tensor=1").layouts
    from megadit.preflight.training import EXACT, configuration
    from megadit.training.config import check

    made = [configuration(layouts, 16, chosen, EXACT, 2) for chosen in layouts]
    for config in made:
        check(config, 16)
    assert len({(config.model.layers, config.model.experts, config.data.global_batch) for config in made}) == 1
    alone = configuration(layouts, 16, None, EXACT, 2)
    check(alone, 1)
    assert Settings(layouts).steps == 3
