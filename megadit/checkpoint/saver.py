"""Saves one after another, each at once or by a thread of its own while the training goes on.

    save: wait for the save before -> copy to host memory (all that training waits for) -> thread: plan, write, commit

The thread's collectives go over a process group that nothing else uses: those of the training keep their order.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megadit.checkpoint.storage import LogicalTensor, Piece
from megadit.checkpoint.store import SaveError, save

logger = logging.getLogger("megadit")

ALIGNMENT = 64  # bytes


class Saved(NamedTuple):
    """How a save ended. `failure`: why nothing was written. `seconds`: without the wait for the save before it."""

    step: int
    seconds: float
    failure: str | None


class Saver:
    """Saves under one folder. A save that cannot be written is logged and leaves its reason in `failure`."""

    def __init__(self, folder: Path, keep: int = 0, keep_every: int = 0, background: bool = False) -> None:
        """`keep` and `keep_every` as in `save`. Collective."""
        self.folder, self.keep, self.keep_every, self.background = folder, keep, keep_every, background
        # gloo on any device: it can wait for a peer without stopping a GPU's work.
        self.group = dist.new_group(backend="gloo")
        self.failure: str | None = None  # why the newest save that has ended was not written; on all ranks alike
        self._ended: list[Saved] = []
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, LogicalTensor], metadata: Mapping[str, object]) -> None:
        """Save a checkpoint, after the one before it; in the background, return once `tensors` may change. Collective.

        Raises what `save` raises, of this save or of the one before it, but SaveError: that becomes `failure`.
        """
        self.wait()
        if not self.background:
            self._write(step, tensors, metadata)
            return
        # A daemon: a process that fails does not stay for peers that may never answer.
        copies = self._staging.copy(tensors)
        self._thread = threading.Thread(target=self._run, args=(step, copies, metadata), name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is running; raise what ended the last one, if that was not a SaveError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _run(self, step: int, tensors: Mapping[str, LogicalTensor], metadata: Mapping[str, object]) -> None:
        try:
            self._write(step, tensors, metadata)
        except BaseException as error:  # for the main thread, which raises it in `wait`
            self._fault = error

    def take_ended(self) -> list[Saved]:
        """The saves that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _write(self, step: int, tensors: Mapping[str, LogicalTensor], metadata: Mapping[str, object]) -> None:
        begin = time.monotonic()
        try:
            save(self.folder, step, tensors, metadata, self.keep, self.keep_every, self.group)
            self.failure = None
        except SaveError as error:
            self.failure = f"the checkpoint of step {step} was not saved in {self.folder}: {error}"
            if dist.get_rank(self.group) == 0:
                logger.error("%s", self.failure)
        self._ended.append(Saved(step, time.monotonic() - begin, self.failure))


class Staging:
    """Host memory for a copy of this rank's pieces, kept from save to save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, LogicalTensor]) -> dict[str, LogicalTensor]:
        """The same tensors in host memory, until the next copy. Returns when all of it is there."""
        held = [piece.tensor for tensor in tensors.values() for piece in tensor.pieces]
        on_gpu, size = any(piece.is_cuda for piece in held), sum(_aligned(piece.nbytes) for piece in held)
        if self._memory.numel() < size:
            self._memory = _host_memory(size, page_locked=on_gpu)
        copies, end = {}, 0
        for name, tensor in tensors.items():
            pieces = []
            for piece in tensor.pieces:
                begin, end = end, end + _aligned(piece.tensor.nbytes)
                place = self._memory[begin : begin + piece.tensor.nbytes].view(piece.tensor.dtype)
                place = place.view(piece.tensor.shape)
                place.copy_(piece.tensor.detach(), non_blocking=True)
                pieces.append(Piece(piece.offsets, place))
            copies[name] = replace(tensor, pieces=tuple(pieces))
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # host sync: the next step writes into what is copied here
        return copies


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _host_memory(num_bytes: int, page_locked: bool) -> torch.Tensor:
    """Uninitialised bytes. A GPU copies into page-locked memory several times as fast."""
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if page_locked:
        # Registered, not taken from torch's pool of page-locked memory: that rounds up to a power of two.
        cudart, address = torch.cuda.cudart(), memory.data_ptr()
        status = int(cudart.cudaHostRegister(address, num_bytes, 0))
        if status:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # CUDA keeps the error for the next launch, which this one is
            logger.warning("host memory for checkpoints is not page-locked (CUDA error %d): saves are slower", status)
        else:
            weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False
    return memory
