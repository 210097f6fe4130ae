"""Who hears of a step: metrics.jsonl always, TensorBoard when asked, the progress bar on the main process."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megadit.training.step import StepReport

logger = logging.getLogger("megadit")

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Recorder:
    """Writes what the loop tells it. Used on the main process only."""

    def __init__(self, directory: Path, start: int, steps: int, tensorboard: bool) -> None:
        """Goes on after step `start`: lines of later steps, which a killed run wrote, are dropped."""
        path = directory / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= start] if path.exists() else []
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(replacement, path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""  # what found no room
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        # In a log file, a line every now and then instead of a bar that moves.
        pace = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=pace, maxinterval=pace
        )

    def record(self, report: StepReport, **measured: float) -> None:
        """One line of metrics.jsonl; floats are printed with all their digits."""
        line = dataclasses.asdict(report) | measured
        self._append(json.dumps(line).encode() + b"\n")
        try:
            self._draw(report, line)
        except OSError as error:
            logger.error("TensorBoard's curves end here, at step %d: %s", report.step, error)
            self._board = None
        self._bar.set_postfix(loss=f"{report.loss:.4f}", grad=f"{report.grad_norm:.2f}", refresh=False)
        self._bar.update()

    def _append(self, line: bytes) -> None:
        """Write to metrics.jsonl. What a full disk does not take is kept and tried again with the next line."""
        waited = bool(self._unwritten)
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                logger.error("%s: %s; its lines wait for room", self._file.name, error)

    def _draw(self, report: StepReport, line: dict[str, Any]) -> None:
        """TensorBoard's curves, if there are any."""
        if self._board is None:
            return
        for key, value in line.items():
            if isinstance(value, float):
                self._board.add_scalar(key, value, report.step)
        for layer, stats in report.routing.items():
            for key, value in stats.items():
                if isinstance(value, list):  # of all experts: how far the busiest is from its share
                    key, value = f"{key}_max", max(value)
                self._board.add_scalar(f"routing/{key}/layer_{layer}", value, report.step)

    def close(self) -> None:
        """Flush and end the bar."""
        self._append(b"")
        self._file.close()
        self._bar.close()
        if self._board is not None:
            self._board.close()
