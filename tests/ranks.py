"""Several ranks on this machine for a test: forked from a process that has imported torch and DeepSpeed once."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

TIME_LIMIT = 150  # seconds; a rank that takes longer prints its stack and the test fails

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.pipelining", "megadit.train", "tests.preload"])


def _work(target: Callable[..., Any], args: tuple, rank: int, connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(TIME_LIMIT - 10, exit=True)
    try:
        connection.send((True, target(rank, *args)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
        connection.close()


def _gather(target: Callable[..., Any], world_size: int, args: tuple) -> list[Any]:
    processes, ends = [], []
    for rank in range(world_size):
        parent, child = _context.Pipe(duplex=False)
        process = _context.Process(target=_work, args=(target, args, rank, child), daemon=True)
        process.start()
        child.close()
        processes.append(process)
        ends.append(parent)
    results: list[Any] = [None] * world_size
    faults = []
    try:
        # In the order of arrival: the first rank to fail says why, the others may hang because of it.
        waiting = dict(zip(ends, range(world_size), strict=True))
        while waiting and not faults:
            ready = multiprocessing.connection.wait(list(waiting), timeout=TIME_LIMIT)
            if not ready:
                faults.append(f"ranks {sorted(waiting.values())} did not finish in {TIME_LIMIT} s")
            for end in ready:
                rank = waiting.pop(end)
                try:
                    good, value = end.recv()
                except EOFError:
                    good, value = False, "the process ended without a word"
                if good:
                    results[rank] = value
                else:
                    faults.append(f"rank {rank}: {value}")
    finally:
        for process in processes:
            if faults:
                process.terminate()
            process.join(20)
            if process.is_alive():
                process.kill()
    assert not faults, "\n".join(faults)
    return results


def _in_group(rank: int, fn: Callable[..., Any], world_size: int, init_file: str, args: tuple) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIME_LIMIT)
    )
    try:
        return fn(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank of a gloo group; what each returned, by rank.

    `fn` is a top-level function of a test module. A failing rank's traceback fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _gather(_in_group, world_size, (fn, world_size, str(Path(folder) / "store"), args))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _train(rank: int, environ: dict[str, str], world_size: int, argv: Sequence[str], rank_key: str) -> tuple[int, str]:
    from megadit.train import main

    os.environ.update(environ | {rank_key: str(rank)})
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(argv)
    sys.stderr.write(errors.getvalue())
    return status, errors.getvalue()


def train_on(world_size: int, *argv: str) -> list[tuple[int, str]]:
    """`python -m megadit.train` on several ranks, as a launcher would start it: (exit status, stderr) of each."""
    environ = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return _gather(_train, world_size, (environ, world_size, argv, "RANK"))
