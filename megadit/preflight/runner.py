"""Runs the checks: each on all ranks at once, in a thread of its own that may hang, within a time limit.

A check measures on every rank, and what the ranks found is judged on rank 0. A rank that raises does not stop the
checks after it. When a check does not end on some rank, the report says where every rank was, and nothing else is run:
that rank's groups are of no more use.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadit.preflight.rollcall import RollCall
from megadit.preflight.station import Member, Station
from megadit.preflight.verdict import Outcome, Report, Verdict

GRACE_S = 5.0  # that ranks have to end too when one of them has raised, or to say that they hang

WAITING = ("/torch/distributed/", "/torch/cuda/")  # files whose lines wait for other ranks, or for the device

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """`measure` runs on every rank and returns plain data; `judge` sees what all returned, by rank, on rank 0."""

    name: str
    measure: Callable[[Station], Any]
    judge: Callable[[Station, list[Any]], Verdict]


class Attempt(threading.Thread):
    """One rank's part of one check."""

    def __init__(self, check: Check, station: Station) -> None:
        super().__init__(name=check.name, daemon=True)
        self._check, self._station = check, station
        self.found: Any = None
        self.error: str | None = None

    def run(self) -> None:
        try:
            if self._station.on_gpu:
                torch.cuda.set_device(self._station.process.device)  # each thread has its own
            self.found = self._check.measure(self._station)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}:{frame.lineno}, during {self._station.doing}"
            self.error = f"{type(error).__name__}: {error} (at {where})"

    def whereabouts(self) -> dict[str, Any]:
        """Where the thread is: what it is doing, its innermost line, and whether that waits for other ranks."""
        stack = traceback.extract_stack(sys._current_frames()[self.ident or 0])
        ours = next((frame for frame in reversed(stack) if "/megadit/" in frame.filename), stack[-1])
        last = stack[-1]
        line = f"{last.line} ({ours.filename.rpartition('/megadit/')[2]}:{ours.lineno})"
        waits = any(part in last.filename for part in WAITING) or ".wait(" in (last.line or "")
        if self._station.on_gpu:  # the host waits for the device wherever it reads a number, the device for others
            waits = waits or not torch.cuda.default_stream(self._station.process.device).query()
        return {"doing": self._station.doing, "marks": self._station.marks, "waits": waits, "line": line}


def assemble(station: Station, rollcall: RollCall) -> Outcome:
    """Call the roll: afterwards every rank knows every other by name. Collective."""
    begin, limit = time.monotonic(), station.settings.limit_s
    me = station.me
    rollcall.bring("arrival", [me.rank, me.host, me.device])
    if rollcall.rank:
        word = rollcall.hear("arrival", limit + GRACE_S)
    else:
        come = rollcall.gather("arrival", begin + limit)
        word = [come.get(rank, [rank, "unknown host", "unknown device"]) for rank in range(rollcall.world_size)]
        missing = [rank for rank in range(rollcall.world_size) if rank not in come]
        rollcall.tell("arrival", {"members": word, "missing": missing})
        word = {"members": word, "missing": missing}
    station.members = [Member(*each) for each in word["members"]]
    hosts = len(station.hosts())
    verdict = Verdict(f"{rollcall.world_size} ranks on {hosts} host{'s' * (hosts > 1)}")
    if word["missing"]:
        verdict.faults.append(f"did not arrive in {limit:.0f} s: {station.names(word['missing'])}")
    return Outcome("arrival", time.monotonic() - begin, verdict)


def run_checks(station: Station, checks: Sequence[Check], rollcall: RollCall, say: Say) -> Report:
    """Run all of them; `say` hears the report line by line, on rank 0. The report is whole on rank 0; the others learn
    which checks failed, and why. Collective. Raises Silence when rank 0 is lost.
    """
    report = Report([assemble(station, rollcall)])
    report.hung = not report.passed
    if station.process.is_main:
        _say(say, report.outcomes[-1])
    for check in checks:
        if report.hung:
            break
        outcome, report.hung = run_check(check, station, rollcall)
        report.outcomes.append(outcome)
        if station.process.is_main:
            _say(say, outcome)
    return report


def _say(say: Say, outcome: Outcome) -> None:
    for line in outcome.lines():
        say(line)


def run_check(check: Check, station: Station, rollcall: RollCall) -> tuple[Outcome, bool]:
    """(what became of it, whether it hangs). Collective."""
    begin, limit = time.monotonic(), station.settings.limit_s
    deadline = begin + limit
    station.mark(f"the start of {check.name}")
    attempt = Attempt(check, station)
    attempt.start()
    while attempt.is_alive() and time.monotonic() < deadline:
        attempt.join(0.2)
        if attempt.is_alive() and rollcall.is_alarmed(check.name):
            deadline = min(deadline, time.monotonic() + GRACE_S)
    if attempt.is_alive():
        rollcall.bring(check.name, {"stuck": attempt.whereabouts()}, alarming=True)
    elif attempt.error is not None:
        rollcall.bring(check.name, {"raised": attempt.error}, alarming=True)
    else:
        rollcall.bring(check.name, {"found": attempt.found})
    if not station.process.is_main:
        word = rollcall.hear(check.name, limit + 3 * GRACE_S)
        return Outcome(check.name, time.monotonic() - begin, Verdict(faults=word["faults"])), word["hung"]
    come = rollcall.gather(check.name, begin + limit + GRACE_S, alarmed_s=GRACE_S)
    hung = any("found" not in answer and "raised" not in answer for answer in come.values())
    hung = hung or len(come) < rollcall.world_size
    seconds = time.monotonic() - begin
    if all("found" in answer for answer in come.values()) and not hung:
        verdict = check.judge(station, [come[rank]["found"] for rank in range(rollcall.world_size)])
    else:
        verdict = explain(station, come, seconds)
    rollcall.tell(check.name, {"faults": verdict.faults, "hung": hung})
    return Outcome(check.name, time.monotonic() - begin, verdict), hung


def explain(station: Station, come: Mapping[int, Mapping[str, Any]], seconds: float) -> Verdict:
    """Why a check did not end well on every rank: who raised what, who did not come, who waited for whom."""
    verdict = Verdict("did not end on every rank")
    said: dict[str, list[int]] = {}
    for rank, answer in come.items():
        if "raised" in answer:
            said.setdefault(answer["raised"], []).append(rank)
    raised = [f"{station.names(ranks)} raised {message}" for message, ranks in said.items()]
    silent = [rank for rank in range(station.process.world_size) if rank not in come]
    if silent:
        verdict.faults.append(f"{station.names(silent)} said nothing in {seconds:.0f} s: ended, or frozen")
        verdict.table += raised  # of connections that broke, most likely
    else:
        verdict.faults += raised
    stuck = {rank: answer["stuck"] for rank, answer in come.items() if "stuck" in answer}
    busy = [rank for rank, where in stuck.items() if not where["waits"]]
    fewest = min((where["marks"] for where in stuck.values()), default=0)
    behind = [rank for rank, where in stuck.items() if where["marks"] == fewest]
    if busy:
        late, why = busy, "did not arrive where the others wait"
    elif stuck and len(behind) < len(stuck):
        late, why = behind, "is behind the others" if len(behind) == 1 else "are behind the others"
    elif stuck and not (said or silent):
        late, why = list(stuck), "all wait for one another"
    else:
        late, why = [], ""
    if late:
        verdict.faults.append(f"{station.names(late)} {why} (after {seconds:.0f} s)")
    verdict.table += [
        f"{station.names([rank])}: {'waiting' if where['waits'] else 'busy'} during {where['doing']}: {where['line']}"
        for rank, where in stuck.items()
    ]
    return verdict
