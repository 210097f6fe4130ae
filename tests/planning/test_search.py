"""Layouts are found, ranked, and refused for a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megadit.planning.hardware import GPUS
from megadit.planning.search import candidates, differences, does_not_fit, nearest, search
from megadit.training.config import check, load_config

CONFIG = "tests/configs/parity.yaml"
OVERRIDES = ("zero.stage=1", "run.dtype=float32", "data.global_batch=32")


@pytest.fixture(scope="module")
def config():
    return load_config(CONFIG, OVERRIDES)


@pytest.fixture(scope="module")
def found(config):
    return search(config, 4, GPUS["h100"])


def test_every_layout_that_passes_the_rules_has_a_plan(config, found):
    allowed = set()
    for candidate in candidates(config, 4, GPUS["h100"]):
        try:
            check(candidate, 4)
        except ValueError:
            continue
        allowed.add(repr(candidate))
    planned = {repr(candidate.config) for candidate in found if candidate.plan}
    assert allowed and planned == allowed  # all of them fit, so nothing is recomputed


def test_all_axes_are_looked_at(config):
    tried = candidates(config, 4, GPUS["h100"])
    assert {c.parallel.tensor for c in tried} == {c.parallel.pipeline for c in tried} == {1, 2, 4}
    assert {c.parallel.expert for c in tried} == {1, 2, 4}
    assert {c.parallel.schedule for c in tried} == {"1f1b", "interleaved", "zbv"}
    assert all(c.parallel.sequence == (c.parallel.tensor > 1) for c in tried)


@pytest.mark.parametrize(("own", "more"), [(0, set()), (4, set()), (16, {16})])
def test_the_configured_microbatch_is_tried_too(own, more, config):
    tried = candidates(replace(config, data=replace(config.data, micro_batch=own)), 4, GPUS["h100"])
    assert {c.data.micro_batch for c in tried} == {1, 2, 4, 8} | more


def test_those_that_fit_come_first_and_the_fastest_of_them(found):
    assert all(not candidate.reason for candidate in found if candidate.plan)
    fitting = [candidate.plan.seconds for candidate in found if not candidate.reason]
    assert fitting == sorted(fitting)
    refused = [candidate for candidate in found if candidate.reason]
    assert found == [candidate for candidate in found if not candidate.reason] + refused


def test_what_does_not_fit_says_where_and_by_how_much(config, found):
    plan = found[0].plan
    tight = replace(plan.gpu, memory_bytes=round(plan.peak / 0.95))
    reason = does_not_fit(replace(plan, gpu=tight), spare=0.1)
    assert "pipeline rank" in reason and "GB more than" in reason and "less 10%" in reason
    assert does_not_fit(replace(plan, gpu=tight), spare=0.01) == ""


@pytest.mark.slow
def test_a_small_gpu_is_refused_before_and_after_activations(config, found):
    peaks = sorted(candidate.plan.peak for candidate in found if candidate.plan)
    small = replace(GPUS["h100"], memory_bytes=peaks[len(peaks) // 4])
    found = search(config, 4, small, spare=0.0)
    assert any("pipeline rank" in candidate.reason for candidate in found)
    recomputed = [candidate for candidate in found if candidate.config.run.recompute != "none"]
    assert {candidate.config.run.recompute for candidate in recomputed} == {"moe", "block"}
    assert any(not candidate.reason for candidate in recomputed)
    assert all(candidate.config.parallel.schedule != "zbv" for candidate in recomputed)
    tiny = replace(small, memory_bytes=peaks[0] // 50)
    reasons = [candidate.reason for candidate in search(config, 4, tiny, spare=0.0)]
    assert all(reasons) and any("optimizer alone" in reason for reason in reasons)


def test_the_nearest_that_fits_differs_in_the_fewest_settings(config, found):
    slow = next(c for c in reversed(found) if c.plan)
    near = nearest(slow.plan, [candidate for candidate in found if candidate is not slow])
    count = len(list(differences(slow.config, near.config)))
    assert count >= 1
    assert all(len(list(differences(slow.config, c.config))) >= count for c in found if c.plan and c is not slow)


def test_differences_are_overrides(config, found):
    other = found[0].config
    changed = load_config(CONFIG, [*OVERRIDES, *differences(config, other)])
    assert changed == other
