"""A check that does not end is explained by where its ranks are."""

import pytest
import torch

from megadit.preflight.runner import explain
from megadit.preflight.station import Member, Settings, Station
from megadit.preflight.verdict import Outcome, Report, Verdict
from megadit.runtime.launch import Process


@pytest.fixture
def station():
    members = [Member(rank, f"host{rank // 2}", f"cuda:{rank % 2}") for rank in range(4)]
    return Station(Process(0, 4, 0, torch.device("cpu")), Settings(()), members)


def stuck(waits, marks=5):
    return {"stuck": {"doing": "hops", "marks": marks, "waits": waits, "line": "x.wait()"}}


FOUND = {"found": None}


@pytest.mark.parametrize(
    ("come", "faults"),
    [
        (  # one is busy with something else
            {0: stuck(True), 1: stuck(True), 2: stuck(False), 3: stuck(True)},
            ["rank 2 (host1, cuda:0) did not arrive where the others wait (after 9 s)"],
        ),
        (  # all wait, one of them for something that came before
            {0: stuck(True), 1: stuck(True, marks=4), 2: stuck(True), 3: FOUND},
            ["rank 1 (host0, cuda:1) is behind the others (after 9 s)"],
        ),
        (
            {0: stuck(True), 1: stuck(True), 2: FOUND, 3: FOUND},
            ["rank 0 (host0, cuda:0), rank 1 (host0, cuda:1) all wait for one another (after 9 s)"],
        ),
        (  # who waits for a rank that is gone is no culprit
            {0: stuck(True), 1: stuck(True), 2: stuck(True)},
            ["rank 3 (host1, cuda:1) said nothing in 9 s: ended, or frozen"],
        ),
        (  # nor who finds its connection to that rank closed
            {0: stuck(True), 1: stuck(True), 2: {"raised": "RuntimeError: connection closed"}},
            ["rank 3 (host1, cuda:1) said nothing in 9 s: ended, or frozen"],
        ),
        (
            {0: stuck(True), 1: {"raised": "ValueError: no"}, 2: stuck(True), 3: {"raised": "ValueError: no"}},
            ["rank 1 (host0, cuda:1), rank 3 (host1, cuda:1) raised ValueError: no"],
        ),
    ],
)
def test_the_culprit_is_named(station, come, faults):
    verdict = explain(station, come, 9.0)
    assert verdict.faults == faults
    told = " ".join(verdict.faults + verdict.table)
    assert all(str(station.members[rank]) in told for rank, answer in come.items() if answer != FOUND)


def test_a_report_passes_when_nothing_failed_or_hung():
    good, skipped = Outcome("good", 1.0, Verdict("all")), Outcome("none", 0.0, Verdict(skipped=True))
    bad = Outcome("bad", 2.0, Verdict(faults=["rank 1"], warnings=["old"]))
    assert Report([good, skipped]).passed and skipped.verdict.status == "SKIP"
    assert not Report([good, bad]).passed and not Report([good], hung=True).passed
    assert Report([good, bad]).conclusion() == "FAIL: bad"
    assert Report([good, bad], hung=True).conclusion() == "FAIL: bad; the checks after it were not run"
    assert bad.lines()[1:] == ["        FAULT    rank 1", "        warning  old"]
