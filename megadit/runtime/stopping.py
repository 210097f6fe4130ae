"""Being asked to stop: by SIGTERM, SIGUSR1, or the end of the time that a run has.

    before the first step   there is nothing to save: the process ends at once, also from within a collective
    while training          the request is noted; the loop tells the others, and all stop after the same step

Imports nothing that takes time, so that a signal is heeded from the first moment on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType

from megadit.runtime.status import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STARTED = time.monotonic()  # of this process, nearly


class StopRequests:
    """Heeds the signals from its construction until `close`. For the main thread.

    At first a signal ends the process at once, with status STOPPED; after `begin` it only gives a `reason`.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._begun = False
        self._deadline: tuple[float, str] | None = None
        # Python's own handlers wait for the main thread, which may be in a collective for minutes: the kernel's
        # handler writes the signal's number into a pipe, which a thread reads.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._heed) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _heed(self, number: int, frame: FrameType | None = None) -> None:
        self._reason = self._reason or f"asked by {signal.Signals(number).name}"
        if not self._begun:
            leave(self._reason)

    def _listen(self) -> None:
        while not self._begun and (told := os.read(self._read, 1)):
            if told[0] in SIGNALS:
                self._heed(told[0])

    def limit(self, seconds: float) -> None:
        """This process has so many seconds in all, if more than 0."""
        if seconds > 0:
            self._deadline = STARTED + seconds, f"its {seconds / 60:g} minutes are over"

    def begin(self) -> None:
        """From now on there is something to save."""
        self._begun = True
        self._end_thread()

    @property
    def reason(self) -> str | None:
        """Why the run should stop; None: it should not."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline[0]:
            self._reason = self._deadline[1]
        return self._reason

    def _end_thread(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        if self._thread.is_alive():
            with contextlib.suppress(BlockingIOError):
                os.write(self._write, b"\0")
            self._thread.join()

    def close(self) -> None:
        """Give the signals back to whoever had them. Where that is `leave_early`, the process is about to end, and
        its status is settled: they are ignored.
        """
        self._begun = True
        self._end_thread()
        for number, handler in self._before.items():
            if handler is leave_early:
                handler = signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._read)
        os.close(self._write)


def leave(reason: str) -> None:
    """End this process at once, before anything of the run has begun; the main one says so."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(sys.stderr.fileno(), f"megadit: {reason} before the first step; start again to go on\n".encode())
    os._exit(STOPPED)


def leave_early(number: int, frame: FrameType | None) -> None:
    """The handler while modules are imported."""
    leave(f"asked by {signal.Signals(number).name}")


def leave_on_signals() -> None:
    """Heed the signals while modules are imported; `StopRequests` takes over."""
    for number in SIGNALS:
        signal.signal(number, leave_early)
