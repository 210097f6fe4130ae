"""Who hears of a step: metrics.jsonl always, TensorBoard when asked, the progress bar on the main process."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megadit.runtime.lines import LineFile, read_lines

if TYPE_CHECKING:
    from megadit.training.step import StepReport

logger = logging.getLogger("megadit")

METRICS_FILE = "metrics.jsonl"


read_metrics = read_lines  # a line per step


class Recorder:
    """Writes what the loop tells it. Used on the main process only."""

    def __init__(self, directory: Path, start: int, steps: int, tensorboard: bool) -> None:
        """Goes on after step `start`: lines of later steps, which a killed run wrote, are dropped."""
        self._folder = directory / "tensorboard"
        self._file = LineFile(directory / METRICS_FILE, keep=lambda line: line["step"] <= start)
        self._board = open_board(self._folder, start + 1) if tensorboard else None
        # In a log file, a line every now and then instead of a bar that moves.
        pace = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=pace, maxinterval=pace
        )

    def record(self, report: StepReport, **measured: float | list[int]) -> None:
        """One line of metrics.jsonl; floats are printed with all their digits."""
        line = dataclasses.asdict(report) | measured
        self._file.append(line)
        try:
            self._draw(report, line)
        except OSError as error:
            logger.error("%s: %s; TensorBoard's curves end here, at step %d", self._folder, error, report.step)
            self._board = None
        self._bar.set_postfix(loss=f"{report.loss:.4f}", grad=f"{report.grad_norm:.2f}", refresh=False)
        self._bar.update()

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
        self._file.close()
        self._bar.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                logger.error("%s: %s; TensorBoard's curves end too early", self._folder, error)


def open_board(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer for steps from `first_step` on; None, with an error in the log, where it cannot write."""
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    try:
        return SummaryWriter(str(folder), purge_step=first_step)
    except OSError as error:
        logger.error("%s: %s; there are no curves for TensorBoard", folder, error)
        return None
