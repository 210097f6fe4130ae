"""DeepSpeed's optimizer behind our protocol: its state is sharded, complete, and goes out and in again."""

import pytest
import torch

from megadit.parallel.placement import placement_of
from tests.ranks import run_ranks
from tests.tiers import slow_but
from tests.zero.runs import advance, copies, fresh

SETTINGS = ["optim.weight_decay=0.3", "optim.clip=1.0"]
ENGINES = {
    "zero1": ["run.dtype=float32", "zero.stage=1"],
    "zero2": ["run.dtype=float32", "zero.stage=2"],
    "zero1_bf16": ["run.dtype=bfloat16", "zero.stage=1"],
    "zero2_bf16": ["run.dtype=bfloat16", "zero.stage=2"],
}
KINDS = {"master", "exp_avg", "exp_avg_sq"}
LAYOUTS = {
    "one": (1, []),
    "data2": (2, []),
    "expert2": (2, ["parallel.expert=2"]),
    "data4": (4, []),
    "expert2_data2": (4, ["parallel.expert=2"]),
    "tensor2_expert2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "pipeline2_data2": (4, ["parallel.pipeline=2"]),
}
CASES = [
    *[(layout, "zero1") for layout in LAYOUTS],
    *[(layout, "zero2") for layout in ("data2", "expert2_data2", "tensor2_expert2", "pipeline2_data2")],
    *[(layout, "zero1_bf16") for layout in ("one", "tensor2_expert2")],
    *[(layout, "zero2_bf16") for layout in ("expert2_data2", "pipeline2_data2")],
]
QUICK = [
    ("one", "zero1"),
    ("tensor2_expert2", "zero1"),
    ("expert2_data2", "zero2"),
    ("one", "zero1_bf16"),
    ("pipeline2_data2", "zero2_bf16"),
]


def saved_and_loaded(rank, world_size, overrides):
    """Train, save, go on; load into another engine, go on too. What this rank holds, for the tests of the whole."""
    run = fresh(rank, world_size, SETTINGS + overrides)
    advance(run, range(1, 4))
    fragments, weights = run.engine.fragments(), copies(run)
    state = {(f.name, f.kind): f.flat.clone() for f in fragments}
    for f in fragments:
        assert f.sharded == placement_of(dict(run.named)[f.name]).data_axes
        assert f.flat.dtype == torch.float32
        if f.kind == "master":
            weight = weights[f.name].flatten()[f.start : f.start + f.flat.numel()]
            assert torch.equal(f.flat.to(weight.dtype), weight), f.name
    if run.config.run.dtype == "bfloat16":
        masters = [f.flat for f in fragments if f.kind == "master"]
        assert any(not torch.equal(master, master.bfloat16().float()) for master in masters), "nothing beyond bf16"
    expected_norms, expected = advance(run, (4, 5)), copies(run)
    assert any(not torch.equal(f.flat, state[f.name, f.kind]) for f in fragments), "views are not live"

    other = fresh(rank, world_size, SETTINGS + overrides, seed=2)
    assert not all(torch.equal(p, weights[name]) for name, p in other.named)
    for f in other.engine.fragments():
        f.flat.copy_(state[f.name, f.kind])
    other.engine.restored(3)
    for name, parameter in other.named:
        assert torch.equal(parameter, weights[name]), name
    assert advance(other, (4, 5)) == expected_norms
    for name, parameter in other.named:
        assert torch.equal(parameter, expected[name]), name

    place = {axis: run.grid[axis].rank for axis in ("pp", "edp", "ep", "tp")}
    parts = {}  # (name, the part of the logical tensor) -> numel
    for name, parameter in run.named:
        cut = placement_of(parameter).cut_axes
        part = tuple(place[axis] if axis in cut else 0 for axis in ("ep", "tp"))
        parts[name, place["pp"], part] = parameter.numel()
    keys = {key[0]: key for key in parts}
    # Parameters that are whole on every tensor rank are held tensor rank by tensor rank.
    ranges = [(keys[f.name], place["tp"], f.kind, f.start, f.flat.numel()) for f in fragments]
    held = sum(moments["exp_avg"].numel() for moments in run.engine.optimizer.optimizer.state.values())
    shares = [p.numel() / run.grid.size(placement_of(p).data_axes) for _, p in run.named]
    return parts, place["tp"], ranges, held, sum(shares)


@pytest.fixture(scope="module", params=slow_but(QUICK, CASES), ids="-".join)
def ranks(request):
    layout, kind = request.param
    world_size, overrides = LAYOUTS[layout]
    return run_ranks(saved_and_loaded, world_size, [*overrides, *ENGINES[kind]])


def test_loaded_state_goes_on_bit_for_bit_and_its_shards_cover_every_parameter_once(ranks):
    covered = {}
    for parts, tp, *_ in ranks:
        for key, numel in parts.items():
            covered |= {(key, tp, kind): torch.zeros(numel, dtype=torch.int) for kind in KINDS}
    for _, _, ranges, *_ in ranks:
        for key, tp, kind, start, numel in ranges:
            covered[key, tp, kind][start : start + numel] += 1
    for where, count in covered.items():
        assert (count == 1).all(), where


def test_each_rank_holds_its_share_of_the_state_and_hardly_more(ranks):
    for *_, held, share in ranks:
        assert share - 64 < held < share + 64  # padding at the end of each group's flat buffer


def against_the_oracle(rank, world_size, overrides):
    """Five steps of ZeRO-1, ZeRO-2 and the float64 oracle: norms, and how far ZeRO-2's state is from the others'."""
    differences = {}
    runs = {kind: fresh(rank, world_size, [*SETTINGS, *overrides, *ENGINES[kind]]) for kind in ("zero1", "zero2")}
    runs["oracle"] = fresh(rank, world_size, [*SETTINGS, *overrides])
    norms = {kind: advance(run, range(1, 6)) for kind, run in runs.items()}
    oracle = {(f.name, f.kind): f.flat for f in runs["oracle"].engine.fragments()}
    oracle |= {(name, "master"): parameter.detach().flatten() for name, parameter in runs["oracle"].named}
    other = {(f.name, f.kind): f.flat for f in runs["zero1"].engine.fragments()}
    assert runs["zero2"].pipeline.num_microbatches > 1
    for f in runs["zero2"].engine.fragments():
        whole = oracle[f.name, f.kind]
        for expected in (whole[f.start : f.start + f.flat.numel()], other[f.name, f.kind]):
            error = float((f.flat - expected.double()).norm() / whole.norm())
            differences[f.kind] = max(error, differences.get(f.kind, 0.0))
    return norms, differences


@pytest.mark.parametrize(
    "layout", slow_but(["data2"], ["data2", "expert2_data2", "tensor2_expert2", "pipeline2_data2"])
)
def test_zero_2_agrees_with_zero_1_and_with_the_oracle(layout):
    world_size, overrides = LAYOUTS[layout]
    for norms, differences in run_ranks(against_the_oracle, world_size, [*overrides, "data.micro_batch=2"]):
        assert norms["zero2"] == pytest.approx(norms["oracle"], rel=2e-5, abs=0)
        assert norms["zero2"] == pytest.approx(norms["zero1"], rel=2e-5, abs=0)
        assert differences.keys() == KINDS
        assert max(differences.values()) < 2e-5, differences
