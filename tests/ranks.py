"""Several ranks on this machine for a test: processes that have imported torch and DeepSpeed once.

The ranks of `run_ranks` are a pool that lives as long as the test session; every call finds them as new, with a
process group of its own. When a rank fails or a call takes too long, the error says where every rank was.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import faulthandler
import gc
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

TIME_LIMIT = 240  # seconds that a call may take: less than pytest's own limit, which cannot tell where the ranks are
GRACE = 2  # seconds, after a rank has failed, that the others have to fail too, or to finish

fork_context = multiprocessing.get_context("forkserver")
fork_context.set_forkserver_preload(["tests.preload", "megadit.train"])


class _Start:
    """What a call may change in its process, as it was when the process started."""

    def __init__(self) -> None:
        import numpy
        import torch

        self.environ, self.modules = dict(os.environ), set(sys.modules)
        self.random = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self.dtype, self.determinism = torch.get_default_dtype(), torch.get_deterministic_debug_mode()
        self.deepspeed = self._copy_deepspeed_globals()

    def _copy_deepspeed_globals(self) -> dict[str, Any]:
        """Its groups: those of a call are gone when the next one begins."""
        from deepspeed.utils import groups

        values = {name: value for name, value in vars(groups).items() if not name.startswith("__")}
        return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in values.items()}

    def restore(self) -> None:
        import numpy
        import torch
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        if os.environ != self.environ:
            os.environ.clear()
            os.environ.update(self.environ)
        # Test modules are imported anew: their globals are no longer those of the call before.
        for name in set(sys.modules) - self.modules:
            if name.startswith("tests."):
                del sys.modules[name]
        random.setstate(self.random[0])
        numpy.random.set_state(self.random[1])
        torch.set_rng_state(self.random[2])
        torch.set_default_dtype(self.dtype)
        torch.set_deterministic_debug_mode(self.determinism)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        comm.cdb = None  # DeepSpeed's handle on the process group
        vars(groups).update(self.deepspeed)
        self.deepspeed = self._copy_deepspeed_globals()
        gc.collect()
        # Parameters that DeepSpeed has linked to its state outlive it. Each would keep its process group, whose threads
        # wake up a hundred times a second.
        for thing in gc.get_objects():
            if type(thing) is torch.nn.Parameter:
                vars(thing).clear()


def _answer(message: bytes, rank: int) -> bytes:
    """Do what the message asks for: (True, result, "") or (False, error, its traceback)."""
    try:
        target, args, folder = pickle.loads(message)
        os.chdir(folder)
        return ForkingPickler.dumps((True, target(rank, *args), ""))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception class that cannot travel
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return ForkingPickler.dumps((False, error, text))


def _serve(rank: int, connection: Any, stack_file: str) -> None:
    """The life of one rank: one answer for each message."""
    import torch

    from megadit.runtime.launch import end_with_parent, run_in_turns

    end_with_parent()  # even when it hangs
    run_in_turns()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends the ranks
    torch.set_num_threads(1)
    with open(stack_file, "w") as stacks:
        # Both write from C: a rank may hang in a collective, or crash.
        faulthandler.register(signal.SIGUSR2, file=stacks)
        faulthandler.enable(file=stacks)
        gc.freeze()  # what is there stays: the collections after each call need not look at it
        start = _Start()
        with contextlib.suppress(EOFError):
            while True:
                connection.send_bytes(_answer(connection.recv_bytes(), rank))
                start.restore()


class _Ranks:
    """Processes that do what they are told, all at the same time."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        self.processes: list[Any] = []
        self.ends: list[Any] = []
        self.count = itertools.count()

    def ask(self, world_size: int, target: Callable[..., Any], *args: Any) -> None:
        """Have each of the first `world_size` ranks do `target(rank, *args)`."""
        # Pickled once, before anyone starts: what cannot be sent must not leave some ranks waiting for the others.
        message = ForkingPickler.dumps((target, args, os.getcwd()))
        for rank in range(len(self.processes), world_size):
            here, there = fork_context.Pipe()
            process = fork_context.Process(target=_serve, args=(rank, there, str(self._stack_file(rank))), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.ends.append(here)
        for end in self.ends[:world_size]:
            end.send_bytes(message)

    def gather(self, world_size: int, limit: float) -> list[Any]:
        """What each rank returned. Otherwise raises, with a note on every rank, and the ranks are of no more use."""
        __tracebackhide__ = True  # the notes tell more than the source of this function
        answers: dict[int, tuple[bool, Any, str]] = {}
        fault, deadline = None, time.monotonic() + limit
        while len(answers) < world_size:
            waiting = {self.ends[rank]: rank for rank in range(world_size) if rank not in answers}
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [waiting[end] for end in ready]:
                good, value, _ = answers[rank] = self.receive(rank)
                if not good and fault is None:
                    # In the order of arrival: the first rank to fail says why, the others may hang because of it.
                    fault, deadline = value, min(deadline, time.monotonic() + GRACE)
        missing = [rank for rank in range(world_size) if rank not in answers]
        if missing and fault is None:
            fault = TimeoutError(f"ranks {missing} did not finish in {limit} s")
        if fault is not None:
            stacks = self._stacks(missing)
            for rank in range(world_size):
                good, _, text = answers.get(rank, (False, None, stacks.get(rank, "")))
                fault.add_note(f"rank {rank} returned" if good else f"rank {rank}{text}")
            raise fault
        return [answers[rank][1] for rank in range(world_size)]

    def receive(self, rank: int) -> tuple[bool, Any, str]:
        """The rank's answer; when it has ended instead, an error that says so."""
        try:
            good, value, text = self.ends[rank].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(GRACE)
            code = self.processes[rank].exitcode
            value = ChildProcessError(f"rank {rank} ended without a word, exit code {code}")
            return False, value, f" ended:\n{self._stack_file(rank).read_text()}"
        return good, value, f" raised:\n{text}"

    def wait_for(self, world_size: int, when: Callable[[], bool]) -> None:
        """Return when `when()` is true; none of the ranks may end before."""
        deadline = time.monotonic() + TIME_LIMIT
        while not when():
            assert time.monotonic() < deadline, "the moment did not come"
            ended = multiprocessing.connection.wait(self.ends, timeout=0.001)
            assert not ended, "a rank ended before the moment"

    def ending(self, rank: int) -> tuple[int, str]:
        """(exit status, stderr) of a rank that trains; of one that has ended its process, stderr is ""."""
        assert self.ends[rank].poll(TIME_LIMIT), f"rank {rank} goes on"
        good, value, text = self.receive(rank)
        if good:
            return value
        assert isinstance(value, ChildProcessError), text
        return self.processes[rank].exitcode, ""

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"stack_{rank}"

    def _stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """Where these ranks are now, all at about the same time."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR2)
        found, deadline = dict.fromkeys(ranks, ""), time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, found = found, {rank: self._stack_file(rank).read_text() for rank in ranks}
            if found == before and all(found.values()):
                break
        return {rank: f" was here:\n{stack or 'it did not say where'}" for rank, stack in found.items()}

    def kill(self) -> None:
        """End every rank, and wait for it."""
        if "COVERAGE_PROCESS_CONFIG" in os.environ:  # a rank saves what it covered when it ends by itself
            for process, end in zip(self.processes, self.ends, strict=True):
                end.close()
                process.join(GRACE)
        for process in self.processes:
            process.kill()
        for process, end in zip(self.processes, self.ends, strict=True):
            process.join()
            end.close()
        shutil.rmtree(self.folder)


_pool: _Ranks | None = None


def _in_group(
    rank: int, fn: Callable[..., Any], world_size: int, init_file: str, timeout: timedelta, args: tuple
) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{init_file}", timeout=timeout, rank=rank, world_size=world_size)
    dist.barrier()  # nobody is done, and gone, before everyone is connected
    result = fn(rank, world_size, *args)
    # Not when it raises: the others would fail of a closed connection, perhaps before this rank could say why.
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, limit: float = TIME_LIMIT) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank of a gloo group; what each returned, by rank.

    `fn` is a top-level function of a test module. It returns numpy arrays, not tensors, which would be shared memory.
    The first exception of a rank is raised here, or TimeoutError after `limit` seconds, with a note on where every
    rank was.
    """
    global _pool
    if _pool is None:
        _pool = _Ranks()
        atexit.register(_pool.kill)
    init_file = _pool.folder / f"store_{next(_pool.count)}"
    try:
        # Longer than the limit, so that it is the limit that ends a hang: it can tell where every rank was.
        _pool.ask(world_size, _in_group, fn, world_size, str(init_file), timedelta(seconds=limit + 60), args)
        results = _pool.gather(world_size, limit)
    except BaseException:  # pytest's own time limit, too
        atexit.unregister(_pool.kill)
        _pool.kill()
        _pool = None
        raise
    init_file.unlink(missing_ok=True)
    return results


def heed_interrupts() -> None:
    """For a child process, before its program starts: what a shell runs in the background ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    """`python -m megadit.train` on several ranks, as a launcher would start it: (exit status, stderr) of each.

    In processes of their own: a training changes loggers and signal handlers, as if it were alone.
    """
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _train, environ or launcher_environ(world_size), argv)
        return ranks.gather(world_size, TIME_LIMIT)
    finally:
        ranks.kill()


def train_and_signal(
    world_size: int, when: Callable[[], bool], number: int, *argv: str, victims: Sequence[int] | None = None
) -> list[tuple[int, str]]:
    """Start a training and send a signal to the `victims` (default: every rank) as soon as `when()` is true.

    (exit status, stderr) of each rank; stderr is "" of one that has ended its process.
    """
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _train, launcher_environ(world_size), argv)
        ranks.wait_for(world_size, when)
        for rank in range(world_size) if victims is None else victims:
            os.kill(ranks.processes[rank].pid, number)
        return [ranks.ending(rank) for rank in range(world_size)]
    finally:
        ranks.kill()


def train_and_kill(world_size: int, when: Callable[[], bool], *argv: str, victims: Sequence[int] | None = None) -> None:
    """Start a training and SIGKILL the `victims` (default: every rank) as soon as `when()` is true.

    The others must end by themselves, with an error or with the status of a loss.
    """
    from megadit.runtime.status import LOST

    victims = range(world_size) if victims is None else victims
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _train, launcher_environ(world_size), argv)
        ranks.wait_for(world_size, when)
        for rank in victims:
            ranks.processes[rank].kill()
        for rank in range(world_size):
            assert ranks.ends[rank].poll(TIME_LIMIT), f"rank {rank} goes on without rank {victims[0]}"
            good, value, _ = ranks.receive(rank)
            killed = isinstance(value, ChildProcessError) and ranks.processes[rank].exitcode != LOST
            assert killed == (rank in victims) and not good, f"rank {rank} ended by itself: {value}"
    finally:
        ranks.kill()


def _tool(rank: int, environ: dict[str, str], script: str, argv: Sequence[str], stdin: str) -> tuple[int, str, str]:
    import runpy

    os.environ.update({key: value.format(rank=rank) for key, value in environ.items()})
    output, errors = io.StringIO(), io.StringIO()
    sys.argv = [script, *argv]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(script, run_name="__main__")
            status: Any = 0
        except SystemExit as ending:
            status = ending.code
    return int(status or 0), output.getvalue(), errors.getvalue()


def tool_on(world_size: int, script: str, *argv: object, stdin: str = "") -> list[tuple[int, str, str]]:
    """A tool on several ranks, as a launcher would start it: (exit status, stdout, stderr) of each."""
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _tool, launcher_environ(world_size), script, [str(arg) for arg in argv], stdin)
        return ranks.gather(world_size, TIME_LIMIT)
    finally:
        ranks.kill()
