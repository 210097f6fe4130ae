"""events.jsonl: what happened to a run, line by line, over all its starts.

A line has `time` (seconds since 1970, of the wall clock), `event`, `step` (the last one that was done), `reason` (one
sentence), and what else there is to say. Events:

    start, resume   the run begins, or goes on from a checkpoint; `layout`, `world_size`, `hosts`
    layout          another layout than the configured one fits this world: one of parallel.fallbacks
    skip            a step without finite numbers was left out; `ranks`: [{rank, sample_ids}]
    spike           a loss or a gradient norm stands out from those before it
    rewind          back to a checkpoint from before a spike: `to_step`, `batches` (first and last) that are passed over
    flip            replicas of a parameter differ; `parameters`, `ranks`
    save            a checkpoint is complete, or failed: `saved`, `seconds`
    signal          somebody or the clock asked the run to stop
    lost            a rank died, hung or raised; `ranks`, `kind`, `collective` that the others waited for, `dumps`
    stop, finish    the run ends before its last step, or after it; `status`: the exit status
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from megadit.runtime.lines import LineFile, append_line

EVENTS_FILE = "events.jsonl"


class Events:
    """The story of a run."""

    def __init__(self, directory: Path | None) -> None:
        """Written into `directory`; None: to nobody, on all processes but the main one. Raises OSError."""
        self._file = LineFile(directory / EVENTS_FILE) if directory else None

    def tell(self, event: str, step: int, reason: str, **more: object) -> None:
        """Write one line; see the top of this file."""
        if self._file is not None:
            self._file.append(line_of(event, step, reason, **more))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def append_event(directory: Path, event: str, step: int, reason: str, **more: object) -> None:
    """Write one line from whichever rank, also while the main process has the file open. Raises OSError."""
    append_line(directory / EVENTS_FILE, line_of(event, step, reason, **more))


def line_of(event: str, step: int, reason: str, **more: object) -> dict[str, object]:
    """One event as it is written.

    >>> {key: value for key, value in line_of("stop", 7, "asked by SIGTERM", status=75).items() if key != "time"}
    {'event': 'stop', 'step': 7, 'reason': 'asked by SIGTERM', 'status': 75}
    """
    line = {"time": time.time(), "event": event, "step": step, "reason": reason, **more}
    json.dumps(line)  # what cannot be written is a fault of ours, to be met here and not half-way through a line
    return line
