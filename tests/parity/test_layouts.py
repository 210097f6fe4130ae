"""Every layout computes what one process computes: losses, gradient norms, each gradient, each parameter.

Five optimizer steps with clipping and weight decay, against one process in float64. A case alone, by its name:

    python -m pytest -m "" tests/parity/test_layouts.py -k tp2-pp2-ep1-edp1-zbv-seq-float64-expert_choice
"""

from functools import cache

import pytest

from megadit.training.config import load_config
from tests.parity.cases import ENGINES, QUICK, SEEDS, SLOW, covering, exhaustive, uneven
from tests.parity.compared import assert_small, errors
from tests.parity.training import CONFIG, oracle, result_of

# Relative: of losses, norms and parameters, and of gradients.
EXACT, ROUNDED = (1e-9, 1e-9), (2e-5, 1e-4)
TOLERANCES = {"float64": EXACT, "zero1": ROUNDED, "zero2": ROUNDED}


@cache
def one_process(model_overrides, first_seed):
    """The oracle, and its seed."""
    overrides = (*model_overrides, *ENGINES["float64"])
    (seed, result), clip = oracle(overrides, first_seed), load_config(CONFIG, overrides).optim.clip
    assert min(result.norms) > clip, "clipping is not active: the test would not see it"
    for name, gradient in result.gradients.items():
        assert gradient.norm() > 0, f"{name} has no gradient: the test would not see it"
    return seed, result


DRILLS = dict.fromkeys((*exhaustive(4), *covering(8), *uneven()), [pytest.mark.drill])
CASES = DRILLS | dict.fromkeys(SLOW, [pytest.mark.slow]) | dict.fromkeys(QUICK, [])


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=marks) for case, marks in CASES.items()])
def test_a_layout_agrees_with_one_process(case):
    seed, expected = one_process(case.model_overrides, SEEDS.get(case.model, 0))
    found = result_of(case.layout.world_size, (*case.overrides, f"run.seed={seed}"))
    tolerance, of_gradients = TOLERANCES[case.engine]
    assert_small(errors(found.gradients, expected.gradients), of_gradients, "gradients")
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=0)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance, abs=0)
    assert_small(errors(found.parameters, expected.parameters), tolerance, "parameters")
    for ours, theirs in zip(found.routing, expected.routing, strict=True):
        assert ours == pytest.approx(theirs, rel=max(tolerance, 1e-9), abs=1e-12)
