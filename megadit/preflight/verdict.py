"""What became of a check, and of all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"


@dataclass
class Verdict:
    """faults make a check fail; each names the culprit. figures: what the JSON file has beside them."""

    summary: str = ""
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    figures: Any = None
    skipped: bool = False  # there was nothing to do; the summary says why

    @property
    def status(self) -> str:
        if self.faults:
            return FAIL
        return SKIP if self.skipped else PASS


@dataclass
class Outcome:
    """One check's verdict, and the seconds that it took."""

    name: str
    seconds: float
    verdict: Verdict

    def lines(self) -> list[str]:
        """The check's part of the report."""
        verdict = self.verdict
        head = f"{verdict.status}  {self.name:<12s} {self.seconds:6.1f} s  {verdict.summary}".rstrip()
        faults = [f"        FAULT    {fault}" for fault in verdict.faults]
        warnings = [f"        warning  {warning}" for warning in verdict.warnings]
        return [head, *faults, *warnings, *(f"        {row}".rstrip() for row in verdict.table)]


@dataclass
class Report:
    """All checks that ran; `hung`: one did not end, and those after it were not run."""

    outcomes: list[Outcome] = field(default_factory=list)
    hung: bool = False

    @property
    def passed(self) -> bool:
        return not self.hung and all(outcome.verdict.status != FAIL for outcome in self.outcomes)

    def conclusion(self) -> str:
        """The last line."""
        failed = [outcome.name for outcome in self.outcomes if outcome.verdict.status == FAIL]
        warnings = sum(len(outcome.verdict.warnings) for outcome in self.outcomes)
        if self.passed:
            return f"PASS: {len(self.outcomes)} checks, {warnings} warnings"
        return f"FAIL: {', '.join(failed)}" + ("; the checks after it were not run" if self.hung else "")

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        checks = [
            {"name": each.name, "status": each.verdict.status, "seconds": each.seconds, **asdict(each.verdict)}
            for each in self.outcomes
        ]
        return {"passed": self.passed, "hung": self.hung, "checks": checks}
