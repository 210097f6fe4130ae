"""A plan says what a dry run does: state to the byte, every collective, activations within a few percent.

A dry run is the production code on the meta device, so these tests hold the closed forms, and the small stages that
activations are measured on, against it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megadit.model.count import flops_of, products_of
from megadit.planning.dry_run import dry_run, roles
from megadit.planning.hardware import GPUS
from megadit.planning.plan import Plan, Planner
from megadit.planning.simulation import fake_world
from megadit.planning.summary import to_dict
from megadit.training.config import RunConfig, check, load_config
from tests.parity.cases import MODELS, SHAPES, layouts_of
from tests.tiers import slow_but

CONFIGS = sorted(Path("examples/configs").glob("*.yaml"))
SMALL = [path for path in CONFIGS if path.stem in ("digits", "digits_class", "ec_dit_s_8e")]
PARITY = "tests/configs/parity.yaml"
EXACT = ("weights", "masters", "moments", "ema", "gradients", "buffers")
NEAR = 0.03  # of activations
H100 = GPUS["h100"]


def planned(config: RunConfig, world_size: int) -> Plan:
    with fake_world(0, world_size):
        return Planner(H100).plan(config, check(config, world_size))


def assert_agrees(plan: Plan, config: RunConfig, rank: int) -> None:
    """The plan's pipeline rank against a dry run of `rank`, one of its ranks."""
    played = dry_run(config, plan.world_size, rank)
    told = plan.ranks[roles(plan.layout).index(rank)]
    assert told.layers == played.stages
    assert told.parameters == played.parameters
    assert {name: getattr(told.memory, name) for name in EXACT} == {
        name: getattr(played.memory, name) for name in EXACT
    }
    assert told.memory.activations == pytest.approx(played.memory.activations, rel=NEAR)
    assert told.memory.peak >= (1 - NEAR) * played.peak
    assert told.collectives == played.collectives


def worlds_of(path: Path) -> int:
    """The smallest world that an example is meant for: its header says so, or it is for one process."""
    header = next((line for line in path.read_text().splitlines() if line.startswith("# Cluster: ")), "# Cluster: 1 ")
    return int(header.removeprefix("# Cluster: ").split()[0].rstrip(","))


@pytest.mark.parametrize("path", slow_but(SMALL, CONFIGS), ids=lambda path: path.stem)
def test_every_example_is_dry_run_as_planned(path):
    config, world_size = load_config(path), worlds_of(path)
    plan = planned(config, world_size)
    assert_agrees(plan, config, roles(plan.layout)[-1])


@pytest.mark.drill
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_pipeline_rank_of_every_example_is_dry_run_as_planned(path):
    config, world_size = load_config(path), worlds_of(path)
    plan = planned(config, world_size)
    for rank in roles(plan.layout):
        assert_agrees(plan, config, rank)


def test_a_cluster_of_512_gpus_has_room_for_97_billion_parameters():
    for world_size in (512, 1024):
        plan = planned(load_config("examples/configs/ec_dit_m_64e.yaml"), world_size)
        assert plan.headroom > 0.1


# Captions of a frozen encoder, with a pooled vector and none.
FROZEN_TEXT = ("text.kind=t5+clip", "text.channels=40", "text.pooled=24", "text.length=11")
NETWORKS = {
    "states": ("text.kind=precomputed", "text.channels=24"),
    "pooled": FROZEN_TEXT,
    "rotary": ("model.positions=rotary",),
    "half": ("objective.keep_tokens=0.5",),
    "rotary_part": ("model.positions=rotary", "objective.keep_tokens=0.5", "model.routing_group=2"),
}
NETWORK_LAYOUTS = {
    "one": (1, ()),
    "tensor_pipeline": (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")),
    "zbv_expert": (4, ("parallel.pipeline=2", "parallel.schedule=zbv", "parallel.expert=2")),
}
WIDE = ("model.width=64", "model.head_width=8", "model.image_size=16", "model.channels=4", "data.global_batch=32")


@pytest.mark.parametrize("layout", slow_but({"tensor_pipeline"}, NETWORK_LAYOUTS))
@pytest.mark.parametrize("network", slow_but(["pooled", "rotary_part"], NETWORKS))
def test_another_network_is_dry_run_as_planned(network, layout):
    world_size, overrides = NETWORK_LAYOUTS[layout]
    config = load_config(PARITY, [*NETWORKS[network], *WIDE, *overrides])
    plan = planned(config, world_size)
    for rank in roles(plan.layout):
        assert_agrees(plan, config, rank)


def random_overrides(seed: int) -> tuple[int, tuple[str, ...]]:
    """(number of processes, overrides of the parity configuration) of a layout that passes the rules."""
    draw = random.Random(seed)
    models = {name: overrides for name, overrides in (MODELS | SHAPES).items() if name != "dropless"}
    while True:
        layout = draw.choice(layouts_of(draw.choice((1, 2, 4, 8))))
        dtype, stage = draw.choice((("float64", 0), ("float32", 0), ("float32", 1), ("bfloat16", 1), ("bfloat16", 2)))
        overrides = (
            *models[draw.choice(sorted(models))],
            f"parallel.tensor={layout.tp}",
            f"parallel.pipeline={layout.pp}",
            f"parallel.expert={layout.ep}",
            f"parallel.sequence={draw.choice(('true', 'false')) if layout.tp > 1 else 'false'}",
            f"parallel.schedule={draw.choice(('1f1b', 'interleaved', 'zbv'))}",
            f"run.recompute={draw.choice(('none', 'block', 'moe'))}",
            f"run.dtype={dtype}",
            f"zero.stage={stage}",
            f"data.micro_batch={draw.choice((2, 4))}",
            "data.global_batch=64",
            # Wide enough that activations are more than odds and ends.
            *("model.width=64", "model.head_width=8", "model.image_size=16", "model.channels=4"),
        )
        try:
            check(load_config(PARITY, overrides), layout.world_size)
        except ValueError:
            continue
        return layout.world_size, overrides


@pytest.mark.parametrize(
    "seed",
    [
        *range(3),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 10)),
        *(pytest.param(seed, marks=pytest.mark.drill) for seed in range(10, 30)),
    ],
)
def test_a_random_layout_is_dry_run_as_planned(seed):
    world_size, overrides = random_overrides(seed)
    config = load_config(PARITY, overrides)
    plan = planned(config, world_size)
    assert_agrees(plan, config, random.Random(seed).choice(roles(plan.layout)))


def test_the_terms_of_a_step_add_up():
    plan = planned(load_config(PARITY, ["parallel.pipeline=2", "parallel.expert=2"]), 8)
    assert sum(plan.terms.values()) == pytest.approx(plan.seconds)
    assert 0 < plan.mfu < 1


def test_more_microbatches_make_a_smaller_bubble():
    few, many = (
        planned(load_config(PARITY, ["parallel.pipeline=4", f"data.global_batch={batch}"]), 4) for batch in (16, 64)
    )
    assert many.timeline.bubble < few.timeline.bubble


def test_half_of_the_tokens_cost_less_than_half_of_the_work():
    """Attention is quadratic; the captions, the text's keys and the modulation are as they were."""
    whole, half = (
        planned(load_config(PARITY, [*WIDE, f"objective.keep_tokens={keep}"]), 2) for keep in (1.0, 0.5)
    )  # fmt: skip
    assert whole.tokens == 64 and half.tokens == 32
    counted = [
        flops_of(products_of(plan.model, plan.config.text, 1, tokens=plan.tokens), fused=False)
        for plan in (whole, half)
    ]
    for plan, flops in zip((whole, half), counted, strict=True):
        assert plan.flops == 32 * (flops.forward + flops.backward)
        parts = to_dict(plan)["flops_per_image"]
        assert sum(part["forward"] for part in parts.values()) == flops.forward
    assert 0.4 < half.flops / whole.flops < 0.6
    assert half.peak < whole.peak
