"""Wall time and peak memory."""

import time

import pytest
import torch

from megadit.runtime.clock import Clock, peak_memory_gb


def test_laps_add_up_to_the_time_that_passed(monkeypatch):
    now = iter([10.0, 12.0, 15.5, 15.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    assert [clock.lap(), clock.lap(), clock.lap()] == [2.0, 3.5, 0.0]


def test_a_lap_is_in_seconds():
    clock = Clock()
    time.sleep(0.05)
    assert 0.05 <= clock.lap() < 5


def test_peak_memory_is_in_gigabytes_and_does_not_fall():
    before = peak_memory_gb(torch.device("cpu"))
    held = torch.ones(int(before * 1.2e9), dtype=torch.uint8)
    peak = peak_memory_gb(torch.device("cpu"))
    assert 1.2 * before < peak < 2.4 * before
    del held
    assert peak_memory_gb(torch.device("cpu")) == pytest.approx(peak, rel=0.01)
