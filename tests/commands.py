"""Python command lines for tests: in a forked child that has everything imported, in place of a new interpreter.

A child of the fork server is a real process with a working directory, an environment, standard streams and an exit
status, and it receives signals. It only saves the seconds that a new interpreter needs to import torch. A test of the
start itself (imports, variables that libraries read when they are imported) needs a new interpreter.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.ranks import TIME_LIMIT, fork_context


def _execute(argv: Sequence[str]) -> int:
    """Run `python ARGV` in this process, from its `-m` or script name on. Returns the exit status."""
    try:
        if argv[0] == "-m":
            sys.argv = list(argv[1:])
            sys.path.insert(0, os.getcwd())
            sys.modules.pop(argv[1], None)  # its code runs again, as __main__
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(argv)
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ending:
        if isinstance(ending.code, str):
            sys.stderr.write(f"{ending.code}\n")
            return 1
        return int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main(argv: Sequence[str], environ: Mapping[str, str], folder: str, streams: Sequence[str]) -> None:
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (for as long as the process lives)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    if "OMP_NUM_THREADS" in environ:  # read once, when torch was imported
        torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    sys.exit(_execute(argv))


class Command:
    """A command that has been started. Its streams are files, so it never waits for a reader."""

    def __init__(
        self,
        argv: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdin: str = "",
    ) -> None:
        self.argv = [str(arg) for arg in argv]
        self._scratch = tempfile.TemporaryDirectory(prefix="command_")
        self._streams = [Path(self._scratch.name) / name for name in ("stdin", "stdout", "stderr")]
        for path, text in zip(self._streams, (stdin, "", ""), strict=True):
            path.write_text(text, encoding="utf-8")
        arguments = (self.argv, dict(os.environ if env is None else env), str(cwd or os.getcwd()))
        self._process: Any = fork_context.Process(
            target=_main, args=(*arguments, [str(path) for path in self._streams])
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> str:
        return self._streams[1].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._streams[2].read_text(encoding="utf-8")

    def poll(self) -> int | None:
        """The exit status, None while the command runs."""
        return self._process.exitcode

    def wait(self, timeout: float = TIME_LIMIT) -> int:
        """Exit status, negative for the signal that ended it. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.argv, timeout, self.stdout, self.stderr)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        """End the command where it still runs."""
        self._process.kill()
        self._process.join()
        self._scratch.cleanup()


def run_python(*argv: object, timeout: float = TIME_LIMIT, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python ARGV`, as `subprocess.run` returns it. `options`: those of `Command`."""
    with Command(argv, **options) as command:
        status = command.wait(timeout)
        return subprocess.CompletedProcess(command.argv, status, command.stdout, command.stderr)
