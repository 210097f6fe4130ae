"""Where a run is, beside its tensors: what a checkpoint's metadata says, so that going on repeats every decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """After some steps.

    step: the steps that are done, those included that were left out. updates: how often the optimizer has changed
    the weights. passed_over: batches that nobody trains on, because the run went back before them; step s reads batch
    s + passed_over. rewinds: how often that was. skipped: the last steps that were left out.
    """

    step: int = 0
    updates: int = 0
    passed_over: int = 0
    rewinds: int = 0
    skipped: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """The number of the batch that the last step read (from 1)."""
        return self.step + self.passed_over

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as JSON takes them."""
        return asdict(self) | {"skipped": list(self.skipped)}

    @classmethod
    def of(cls, step: int, metadata: Mapping[str, Any]) -> Progress:
        """From a checkpoint's step and metadata. One of an older version left nothing out."""
        found = metadata.get("progress")
        if found is None:
            return cls(step=step, updates=step)
        return cls(**{**found, "skipped": tuple(found["skipped"])})

    def after(self, applied: bool, window: int) -> Progress:
        """After one more step; of the steps that were left out the last `window` steps' are remembered."""
        step = self.step + 1
        skipped = tuple(old for old in self.skipped if old > step - window)
        return Progress(
            step=step,
            updates=self.updates + applied,
            passed_over=self.passed_over,
            rewinds=self.rewinds,
            skipped=skipped if applied else (*skipped, step),
        )

    def gone_back(self, bad: Progress) -> Progress:
        """From this older state on, with the batches since it, up to that of `bad`, passed over.

        >>> Progress(step=100, updates=100).gone_back(Progress(step=107, updates=107))
        Progress(step=100, updates=100, passed_over=7, rewinds=1, skipped=())
        """
        return Progress(
            step=self.step,
            updates=self.updates,
            passed_over=bad.batch - self.step,
            rewinds=bad.rewinds + 1,
            skipped=self.skipped,
        )
