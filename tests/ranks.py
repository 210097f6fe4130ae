"""Several ranks on this machine for a test: forked from a process that has imported torch and DeepSpeed once."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

TIME_LIMIT = 150  # seconds; a rank that takes longer prints its stack and the test fails

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload", "megadit.train"])


def _work(target: Callable[..., Any], args: tuple, rank: int, connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(TIME_LIMIT - 10, exit=True)
    try:
        connection.send((True, target(rank, *args)))
    except BaseException as error:
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        connection.send((False, error))
    finally:
        faulthandler.cancel_dump_traceback_later()
        connection.close()


def _start(target: Callable[..., Any], world_size: int, args: tuple) -> tuple[list[Any], list[Any]]:
    """(processes, the ends where their results arrive), by rank."""
    processes, ends = [], []
    for rank in range(world_size):
        parent, child = _context.Pipe(duplex=False)
        process = _context.Process(target=_work, args=(target, args, rank, child), daemon=True)
        process.start()
        child.close()
        processes.append(process)
        ends.append(parent)
    return processes, ends


def _gather(target: Callable[..., Any], world_size: int, args: tuple) -> list[Any]:
    processes, ends = _start(target, world_size, args)
    results: list[Any] = [None] * world_size
    faults: list[BaseException] = []
    try:
        # In the order of arrival: the first rank to fail says why, the others may hang because of it.
        waiting = dict(zip(ends, range(world_size), strict=True))
        while waiting and not faults:
            ready = multiprocessing.connection.wait(list(waiting), timeout=TIME_LIMIT)
            if not ready:
                faults.append(TimeoutError(f"ranks {sorted(waiting.values())} did not finish in {TIME_LIMIT} s"))
            for end in ready:
                rank = waiting.pop(end)
                try:
                    good, value = end.recv()
                except EOFError:
                    good, value = False, ChildProcessError(f"rank {rank} ended without a word")
                if good:
                    results[rank] = value
                else:
                    faults.append(value)
    finally:
        for process in processes:
            if faults:
                process.terminate()
            process.join(20)
            if process.is_alive():
                process.kill()
    if faults:
        raise faults[0]
    return results


def _in_group(rank: int, fn: Callable[..., Any], world_size: int, init_file: str, args: tuple) -> Any:
    import torch.distributed as dist

    limit = timedelta(seconds=TIME_LIMIT)
    dist.init_process_group("gloo", f"file://{init_file}", timeout=limit, rank=rank, world_size=world_size)
    try:
        return fn(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank of a gloo group; what each returned, by rank.

    `fn` is a top-level function of a test module. It returns numpy arrays, not tensors, whose shared memory would end
    with the rank. The first exception of a rank is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _gather(_in_group, world_size, (fn, world_size, str(Path(folder) / "store"), args))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _train(rank: int, environ: dict[str, str], argv: Sequence[str]) -> tuple[int, str]:
    from megadit.train import main

    os.environ.update({key: value.format(rank=rank) for key, value in environ.items()})
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(argv)
    sys.stderr.write(errors.getvalue())
    return status, errors.getvalue()


def launcher_environ(world_size: int) -> dict[str, str]:
    """What torchrun and the deepspeed launcher tell each rank; {rank} stands for its number."""
    place = {"RANK": "{rank}", "LOCAL_RANK": "{rank}", "WORLD_SIZE": str(world_size)}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def train_on(world_size: int, *argv: str, environ: dict[str, str] | None = None) -> list[tuple[int, str]]:
    """`python -m megadit.train` on several ranks, as a launcher would start it: (exit status, stderr) of each."""
    return _gather(_train, world_size, (environ or launcher_environ(world_size), argv))


def train_and_kill(world_size: int, when: Callable[[], bool], *argv: str) -> None:
    """Start a training and SIGKILL every rank as soon as `when()` is true."""
    processes, _ = _start(_train, world_size, (launcher_environ(world_size), argv))
    deadline = time.monotonic() + TIME_LIMIT
    while not when():
        assert time.monotonic() < deadline, "the moment to kill did not come"
        assert all(process.is_alive() for process in processes), "a rank ended before the moment to kill"
        time.sleep(0.001)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL
