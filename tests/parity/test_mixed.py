"""Every layout trains on images of several sizes, on a part of their tokens and with padded captions, as one process.

Four optimizer steps in float64, on square and oblong images in turn, so that one comes again.
"""

from functools import cache

import pytest

from megadit.training.config import load_config
from tests.parity.cases import Case, Layout
from tests.parity.compared import assert_small, errors
from tests.parity.mixed import OVERRIDES, start
from tests.parity.training import CONFIG, result_of
from tests.ranks import run_ranks
from tests.training.assembled import make_step

TOLERANCE = 1e-9  # relative
SINCOS = ("model.positions=sincos",)
WHOLE = ("objective.keep_tokens=1",)
STATES = ("text.kind=precomputed", "text.pooled=0")
FAST = {
    "zbv_sequence": (Case(Layout(2, 2, 1, 1), "zbv", sequence=True), ()),
    "pipeline_expert": (Case(Layout(1, 2, 2, 1)), SINCOS),
    "tensor_expert_sequence": (Case(Layout(2, 1, 2, 1), sequence=True, model="pairs"), ()),
}
DRILLS = {
    "tensor": (Case(Layout(4, 1, 1, 1)), ()),
    "tensor_sequence": (Case(Layout(4, 1, 1, 1), sequence=True, recompute="block"), SINCOS),
    "pipeline": (Case(Layout(1, 4, 1, 1), recompute="moe"), STATES),
    "pipeline_zbv": (Case(Layout(1, 4, 1, 1), "zbv"), ()),
    "expert": (Case(Layout(1, 1, 4, 1), recompute="block"), ()),
    "data": (Case(Layout(1, 1, 1, 4)), WHOLE),
    "interleaved": (Case(Layout(2, 2, 1, 1), "interleaved", sequence=True), WHOLE),
    "interleaved_data": (Case(Layout(1, 2, 1, 2), "interleaved"), (*SINCOS, *STATES)),
    "nucleus": (Case(Layout(2, 1, 2, 1), sequence=True, model="nucleus"), ()),
    "capacity": (Case(Layout(1, 2, 2, 1), "interleaved", model="capacity"), ()),
    "dropless": (Case(Layout(2, 1, 2, 1), sequence=True, model="dropless"), ()),
    "adaln_single": (Case(Layout(2, 2, 1, 1), "zbv", sequence=True, model="adaln_single"), ()),
    "all": (Case(Layout(2, 2, 2, 1), sequence=True), ()),
}
CASES = {"zbv_sequence": [], "pipeline_expert": [], "tensor_expert_sequence": [pytest.mark.slow]}
CASES |= dict.fromkeys(DRILLS, [pytest.mark.drill])


@cache
def one_process(overrides):
    result = result_of(1, overrides, start)
    assert min(result.norms) > load_config(CONFIG).optim.clip, "clipping is not active: the test would not see it"
    for name, gradient in result.gradients.items():
        assert gradient.norm() > 0, f"{name} has no gradient: the test would not see it"
    return result


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in CASES.items()])
def test_a_layout_trains_on_several_sizes_as_one_process_does(name):
    case, changes = (FAST | DRILLS)[name]
    expected = one_process((*changes, *case.model_overrides))
    found = result_of(case.layout.world_size, (*changes, *case.overrides), start)
    assert_small(errors(found.gradients, expected.gradients), TOLERANCE, "gradients")
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE, abs=0)
    assert found.norms == pytest.approx(expected.norms, rel=TOLERANCE, abs=0)
    assert_small(errors(found.parameters, expected.parameters), TOLERANCE, "parameters")
    for ours, theirs in zip(found.routing, expected.routing, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-12)


def buffers_of(rank, world_size, overrides):
    """Bytes of the buffers of each size after every step, and of the one that ran last."""
    run, held = start(rank, world_size, overrides), []
    for step in range(1, 5):
        make_step(run, step)
        sizes = [
            sum(b.untyped_storage().nbytes() for stage in stages for b in stage.buffers) for stages in stages_of(run)
        ]
        held.append(
            (sizes, sum(b.untyped_storage().nbytes() for stage in run.pipeline._holding for b in stage.buffers))
        )
    return held


def stages_of(run):
    return [stages for _, stages in run.pipeline._schedules.values()]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_pipeline_holds_the_buffers_of_one_size(schedule):
    overrides = ("parallel.pipeline=2", f"parallel.schedule={schedule}", "data.micro_batch=4")
    for held in run_ranks(buffers_of, 2, overrides):
        assert [len(sizes) for sizes, _ in held] == [1, 2, 3, 3]
        for sizes, last in held:
            assert sum(sizes) == last > 0 and sizes.count(0) == len(sizes) - 1
        assert held[3][0] == [held[0][1], 0, 0], "the first size, which came again"
        assert held[1][1] < held[0][1], "8 tokens, not 12"


def test_the_cases_hold_every_axis_and_every_option():
    cases = [case for case, _ in (FAST | DRILLS).values()]
    assert all(case.is_allowed for case in cases)
    assert {case.schedule for case in cases} == {"1f1b", "interleaved", "zbv"}
    assert {case.recompute for case in cases} == {"none", "block", "moe"}
    for axis in ("tp", "pp", "ep", "edp"):
        assert {getattr(case.layout, axis) for case in cases} == {1, 2, 4}
    config = load_config(CONFIG, OVERRIDES)
    assert (config.text.pooled, config.model.positions, config.objective.keep_tokens) == (6, "rotary", 0.5)
