"""Every check passes on healthy ranks, and fails with the culprit's name when a fault is planted."""

import re

import pytest

from megadit.preflight.checks import CHECKS
from tests.preflight import planted
from tests.preflight.planted import by_name, examined, settings
from tests.ranks import run_ranks

EVERY_AXIS = ("tensor=2,expert=2", "pipeline=2,expert=2")


def examine(plant, names, chosen):
    """Rank 0's report by check; all ranks must have seen the same faults."""
    ranks = run_ranks(examined, 4, plant, names, chosen)
    faults = [[check["faults"] for check in report["checks"]] for report, _ in ranks]
    assert all(other == faults[0] for other in faults)
    assert all(not lines for _, lines in ranks[1:]), "rank 0 speaks"
    report, lines = ranks[0]
    return report, by_name(report), "\n".join(lines)


def ranks_in(message):
    return {int(rank) for rank in re.findall(r"rank (\d+) \(", message)}


@pytest.mark.slow
def test_healthy_ranks_pass_every_check():
    # Other tests may keep this machine busy; what is slow is the next test's matter.
    chosen = settings(
        4,
        "tensor=2,expert=2,sequence=true",
        "pipeline=2,expert=2,schedule=zbv",
        **{"slow_factor": 4.0, "group_factor": 20.0, "memory_test": 2**20, "largest_message": 2**18},
    )
    report, checks, text = examine(planted.nothing, [check.name for check in CHECKS], chosen)
    assert report["passed"], text
    assert {name: check["status"] for name, check in checks.items() if check["status"] != "PASS"} == {"clock": "SKIP"}
    deviations = checks["parity"]["figures"]["deviations"]
    assert list(deviations) == ["tensor 2 x expert 2, sequence", "pipeline 2 x expert 2, zbv"]
    assert all(0 <= one["float64"] < 1e-12 and one["float32, ZeRO-1"] < 5e-6 for one in deviations.values())


def test_slow_ranks_are_named():
    report, checks, text = examine(planted.slow_ranks, ["compute"], settings(4, EVERY_AXIS[0]))
    products, step = checks["compute"]["faults"]
    assert ranks_in(products) == {1} and "slow: matrix products took" in products
    assert ranks_in(step) == {2} and "slow: a training step alone took" in step
    assert not report["passed"] and not report["hung"]
    assert "FAIL  compute" in text and f"FAULT    {step}" in text


def test_ranks_that_differ_in_version_memory_or_clock_are_named():
    report, checks, _ = examine(
        planted.odd_hosts, ["versions", "clock", "memory"], settings(4, EVERY_AXIS[0], memory_test=2**20)
    )
    assert "4 ranks on 2 hosts" in checks["arrival"]["summary"]
    (fault,) = checks["versions"]["faults"]
    assert re.match(r"deepspeed is 0\.0\.1 on rank 1 \(host0, cpu\); [\d.]+ on 3 ranks$", fault)
    assert any("NCCL_DEBUG is INFO on rank 1 (host0, cpu)" in warning for warning in checks["versions"]["warnings"])
    (warning,) = checks["clock"]["warnings"]
    offset = checks["clock"]["figures"]["host1"]
    assert warning.startswith("the clock of host1 is +5.0") and offset["offset"] == pytest.approx(5, abs=0.2)
    assert 0 < offset["error"] < 0.2
    (fault,) = checks["memory"]["faults"]
    assert ranks_in(fault) == {2} and "1 words differ, the first at byte 4936 (in the pattern)" in fault


def test_a_wrong_all_to_all_names_group_receiver_and_sender():
    _, checks, _ = examine(planted.crossed_all_to_all, ["collectives", "hops"], settings(4, *EVERY_AXIS))
    figures = checks["collectives"]["figures"]
    assert {wrong["sender"] for wrong in figures} == {1}, "the block of the rank that sent it elsewhere"
    assert {wrong["collective"] for wrong in figures} == {"all-to-all", "all-to-all of a view"}
    assert {wrong["receiver"] for wrong in figures if wrong["axis"] == "ep"} == {0, 1, 3}, "of both layouts' ep groups"
    assert re.match(r"rank 1 \(\w+, cpu\) wrote (\d+) of the \1 wrong blocks", checks["collectives"]["faults"][0])
    fault = next(
        fault for fault in checks["collectives"]["faults"] if "all-to-all of ep in tensor 2 x expert 2" in fault
    )
    receiver = 1 if "rank 1 (" in fault.partition("has")[0] else 3
    other = {1: 3, 3: 1}[receiver]
    assert f"what rank 1 wrote for rank {other}" in fault and "has the block of rank 1" in fault
    assert {rank for fault in checks["hops"]["faults"] for rank in ranks_in(fault)} == {0, 1}
    assert all("wrong numbers in the all-to-alls of pipeline" in fault for fault in checks["hops"]["faults"])


def test_a_share_that_is_missing_in_a_sum_is_that_of_its_sender():
    _, checks, _ = examine(planted.lost_share, ["collectives"], settings(4, EVERY_AXIS[0]))
    figures = checks["collectives"]["figures"]
    assert {wrong["sender"] for wrong in figures} == {2, -1}, "the rank's own row, and the sum of all"
    assert {wrong["collective"] for wrong in figures} == {"all-reduce", "all-reduce of the maximum"}
    assert any("has the block of rank 2" in fault and "(nothing)" in fault for fault in checks["collectives"]["faults"])


def test_a_group_behind_its_peers_is_named():
    chosen = settings(4, EVERY_AXIS[0], largest_message=2**18)
    _, checks, text = examine(planted.slow_link, ["bandwidth"], chosen)
    faults = checks["bandwidth"]["faults"]
    assert faults and all(fault.startswith("all-to-all of ") and 3 in ranks_in(fault) for fault in faults)
    assert {tuple(sorted(ranks_in(fault))) for fault in faults} == {(1, 3), (2, 3)}
    assert re.search(r"tp +2 x 2 +all-reduce +1 KiB +[\d.]+ +[\d.]+ +[\d.]+", text)


def test_a_rank_that_does_not_arrive_is_named_and_nothing_hangs():
    report, checks, text = examine(
        planted.late_rank, ["hops", "parity"], settings(4, "pipeline=2,expert=2", limit_s=2.0)
    )
    assert report["hung"] and not report["passed"]
    (fault,) = checks["hops"]["faults"]
    assert ranks_in(fault) == {3} and "did not arrive" in fault
    assert "parity" not in checks, "a rank hangs: its groups are of no more use"
    assert re.search(r"rank 3 \(.*\): busy during round 1 of hops and all-to-alls in pipeline 2 x expert 2", text)
    assert re.search(r"rank [012] \(.*\): waiting during round 1", text)


def test_a_rank_that_raises_is_named_and_the_checks_go_on():
    report, checks, _ = examine(
        planted.raising_rank, ["memory", "groups"], settings(4, EVERY_AXIS[0], memory_test=2**20)
    )
    (fault,) = checks["memory"]["faults"]
    assert ranks_in(fault) == {2} and "OSError: no such device" in fault
    assert checks["groups"]["status"] == "PASS" and not report["hung"]


def test_the_layout_that_disagrees_is_named():
    chosen = settings(4, "tensor=1", "tensor=2,expert=2")
    _, checks, _ = examine(planted.crossed_all_to_all, ["parity"], chosen)
    faults = checks["parity"]["faults"]
    assert {fault.partition(" in float")[0] for fault in faults} == {"tensor 2 x expert 2"}
    assert {"float64", "float32, ZeRO-1"} == {re.search(r" in (float.*) differs", fault)[1] for fault in faults}
    deviations = checks["parity"]["figures"]["deviations"]
    assert deviations["data 4"]["float64"] < 1e-12 and deviations["data 4"]["float32, ZeRO-1"] < 5e-6
