"""One network and its thread: wishes are drawn one at a time, and the last drawings are kept."""

from __future__ import annotations

import queue
import secrets
import threading
from collections import OrderedDict
from concurrent.futures import Future

from megadit.pipeline.pipeline import ECDiTPipeline
from megadit.playground.drawing import Drawing, draw
from megadit.playground.wish import Wish

KEPT = 16  # drawings whose maps can be asked for


class Busy(Exception):
    """Another picture is being drawn."""


class Studio:
    """Draws in the thread that calls `work`, the only one that touches the network; others ask with `drawn`."""

    def __init__(self, pipe: ECDiTPipeline) -> None:
        self.pipe = pipe
        self.kept: OrderedDict[str, Drawing] = OrderedDict()
        self.progress: tuple[int, int] | None = None  # steps done, steps in all; None: nothing is being drawn
        self._wishes: queue.SimpleQueue[tuple[Wish, Future[Drawing]]] = queue.SimpleQueue()
        self._one = threading.Lock()  # held while a picture is asked for

    def work(self) -> None:
        """Draw what others ask for, until this thread is interrupted."""
        while True:
            wish, promise = self._wishes.get()

            def on_step(done: int, steps: int = wish.steps) -> None:
                self.progress = done, steps

            try:
                promise.set_result(draw(self.pipe, wish, on_step))
            except Exception as error:  # of this wish; the next one may go well
                promise.set_exception(error)

    def drawn(self, wish: Wish) -> tuple[str, Drawing]:
        """(its name, a wish's drawing). Waits until it is done. Raises Busy, and what `draw` raises."""
        if not self._one.acquire(blocking=False):
            done, steps = self.progress or (0, 0)
            raise Busy(f"another picture is being drawn, step {done} of {steps}; draw yours when it is done")
        try:
            self.progress = 0, wish.steps
            promise: Future[Drawing] = Future()
            self._wishes.put((wish, promise))
            drawing = promise.result()
            name = secrets.token_hex(8)
            self.kept[name] = drawing
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        finally:
            self.progress = None
            self._one.release()
        return name, drawing
