"""The list of cases holds what it says: every layout, every pair of options, and in the short list every option."""

from dataclasses import fields
from itertools import combinations, product

import pytest

from megadit.model.count import stage_costs
from megadit.parallel.pipeline.partition import partition, stage_indices
from megadit.training.config import check, load_config
from tests.parity.cases import (
    ENGINES,
    MODELS,
    QUICK,
    RECOMPUTE,
    SCHEDULES,
    SLOW,
    Case,
    covering,
    exhaustive,
    layouts_of,
    pairwise,
    uneven,
)
from tests.parity.training import CONFIG


@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8])
def test_layouts_are_all_factorisations(world_size):
    degrees = [(layout.tp, layout.pp, layout.ep, layout.edp) for layout in layouts_of(world_size)]
    counted = [d for d in product(range(1, world_size + 1), repeat=4) if d[0] * d[1] * d[2] * d[3] == world_size]
    assert sorted(degrees) == sorted(counted)


@pytest.mark.parametrize(
    "allowed", [lambda **values: True, lambda a, b, c, d: a != b and (c == 0 or d < 3), lambda a, b, c, d: a == b == 1]
)
def test_every_pair_that_is_allowed_is_covered(allowed):
    axes = {"a": range(2), "b": range(3), "c": range(4), "d": range(5)}
    found = pairwise(axes, allowed)
    everything = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    everything = [values for values in everything if allowed(**values)]
    assert found and all(values in everything for values in found)
    for one, other in combinations(axes, 2):
        wanted = {(values[one], values[other]) for values in everything}
        assert {(values[one], values[other]) for values in found} == wanted
    assert len(found) <= min(len(everything), 25)  # 20 hold all pairs of c and d


def test_on_eight_ranks_every_pair_of_layout_and_options_is_covered():
    cases = covering(8)
    axes = [layouts_of(8), SCHEDULES, (False, True), RECOMPUTE, tuple(ENGINES), tuple(MODELS)]
    everything = [case for case in (Case(*values) for values in product(*axes)) if case.is_allowed]
    assert set(cases) <= set(everything)
    for one, other in combinations([field.name for field in fields(Case)], 2):
        wanted = {(getattr(case, one), getattr(case, other)) for case in everything}
        assert {(getattr(case, one), getattr(case, other)) for case in cases} == wanted, (one, other)
    # Every option also on tensor regions whose tokens are not cut.
    for option in ("schedule", "recompute", "engine", "model"):
        regions = {(case.sequence, getattr(case, option)) for case in cases if case.layout.tp > 1}
        assert regions == set(product((False, True), {getattr(case, option) for case in everything}))
    assert len(cases) < 1.1 * len(layouts_of(8)) * len(MODELS)


def test_on_four_ranks_every_combination_is_there():
    cases = set(exhaustive(4))
    for layout, schedule in product(layouts_of(4), SCHEDULES):
        recompute = RECOMPUTE if schedule != "zbv" else ("none",)
        sequence = (False, True) if layout.tp > 1 else (False,)
        engines = ("zero1", "zero2") if schedule != "zbv" else ("zero1",)
        assert {Case(layout, schedule, *values) for values in product(sequence, recompute)} <= cases
        assert {Case(layout, schedule, engine=engine) for engine in engines} <= cases
    assert len(cases) == 148


def test_the_short_lists_have_every_axis_and_every_option():
    assert len({*QUICK, *SLOW}) == len(QUICK) + len(SLOW) and all(case.is_allowed for case in (*QUICK, *SLOW))
    for axis in ("tp", "pp", "ep", "edp"):
        assert {getattr(case.layout, axis) for case in (*QUICK, *SLOW)} >= {1, 2, 4}
    assert {case.layout.world_size for case in QUICK} == {1, 4}
    for name, values in {"schedule": SCHEDULES, "recompute": RECOMPUTE, "engine": ENGINES}.items():
        assert {getattr(case, name) for case in QUICK} == set(values)
    assert {case.model for case in (*QUICK, *SLOW)} >= set(MODELS)
    assert {case.sequence for case in QUICK} == {False, True}


def test_every_case_is_a_valid_configuration():
    for case in (*QUICK, *SLOW, *covering(8), *uneven()):  # every pair of values that the others have
        config = load_config(CONFIG, case.overrides)
        layout = check(config, case.layout.world_size)
        assert [getattr(layout, axis) for axis in ("tp", "pp", "ep", "edp")] == [
            getattr(case.layout, axis) for axis in ("tp", "pp", "ep", "edp")
        ]


def test_no_two_cases_have_one_name():
    cases = {*QUICK, *SLOW, *exhaustive(4), *covering(8), *uneven()}
    assert len({str(case) for case in cases}) == len(cases)


def test_uneven_cases_have_ranks_with_experts_beside_ranks_without():
    lengths = set()
    for case in uneven():
        model = load_config(CONFIG, case.overrides).model
        config, pp, turns = load_config(CONFIG, case.overrides), case.layout.pp, 1 if case.schedule == "1f1b" else 2
        stages = partition(stage_costs(model, config.text), pp * turns)
        lengths.add(tuple(len(stage) for stage in stages))
        has_experts = [
            any(
                model.is_moe(layer)
                for index in stage_indices(case.schedule, rank, pp, turns)
                for layer in stages[index]
            )
            for rank in range(pp)
        ]
        assert True in has_experts and False in has_experts, case
    assert all(len(set(each)) > 1 for each in lengths)
