"""Ranks that share cores: a step takes as long as the cores need for the work of all."""

from dataclasses import replace

import pytest

from megadit.planning.hardware import Efficiency, Gpu
from megadit.planning.plan import Planner
from megadit.planning.simulation import fake_world
from megadit.planning.timing import seconds_of_collective
from megadit.training.config import check, load_config
from tests.training.assembled import CONFIG

COSTS = {"launch_seconds": 1e-5, "latency_seconds": 2e-4, "message_seconds": 1e-4}
RATES = {"matrix": 0.5, "memory": 0.4, "link": 0.3, "network": 0.3}
CPU = Gpu("cpu", 10**9, {"float64": 1e11}, 1e10, 2e9, 2e9, 8, cores=2, efficiency=Efficiency(**RATES, **COSTS))
LAYOUTS = {
    "tensor2_pipeline2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "expert2_pipeline2": ["parallel.expert=2", "parallel.pipeline=2", "parallel.schedule=interleaved"],
    "pipeline2_data2": ["parallel.pipeline=2", "parallel.schedule=zbv"],
}


def plan_of(gpu, overrides, world_size=4):
    config = load_config(CONFIG, overrides)
    with fake_world(0, world_size):
        return Planner(gpu).plan(config, check(config, world_size))


def communication_of(plan, rank):
    """Seconds of everything that a rank sends and receives in a step."""
    return sum(
        count * seconds_of_collective(operation, nbytes, size, size, plan.gpu)
        for (axis, operation, nbytes), count in plan.ranks[rank].collectives.items()
        if (size := 2 if axis == "pp" else plan.groups[axis][0])
    )


def kernels_of(plan, rank):
    """Seconds of everything that a rank computes in a step."""
    passes = sum(plan.durations[span.action.stage, span.action.kind][0] for span in plan.timeline.ranks[rank])
    return passes + plan.ranks[rank].update_seconds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cores_do_the_work_of_all_ranks(layout):
    one = replace(CPU, cores=1)
    free = replace(one, link_bandwidth=1e30, efficiency=Efficiency(**RATES, launch_seconds=1e-5, latency_seconds=0.0))
    computing, all_of_it = (plan_of(gpu, LAYOUTS[layout]) for gpu in (free, one))
    # Two pipelines of two ranks each are on the one core.
    assert computing.shared_seconds == pytest.approx(
        2 * sum(kernels_of(computing, rank) for rank in range(2)), rel=1e-9
    )
    sent = 2 * sum(communication_of(all_of_it, rank) for rank in range(2))
    assert sent > 0
    assert all_of_it.shared_seconds == pytest.approx(computing.shared_seconds + sent, rel=1e-9)
    assert all_of_it.seconds == all_of_it.shared_seconds > all_of_it.timeline.total + all_of_it.update_seconds


def test_a_rank_alone_waits_for_nobody():
    plan = plan_of(CPU, [], world_size=1)
    alone = plan.timeline.total + plan.update_seconds
    assert plan.seconds == max(alone, plan.shared_seconds)
    assert plan.shared_seconds == pytest.approx(alone, rel=1e-14)  # the same sum in another order


def test_a_gpu_is_not_shared():
    plan = plan_of(replace(CPU, cores=0), LAYOUTS["tensor2_pipeline2"])
    assert plan.shared_seconds == 0
    assert plan.seconds == plan.timeline.total + plan.update_seconds
