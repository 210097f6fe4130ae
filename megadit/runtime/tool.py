"""A command on one process or several: what is refused is one line on stderr, and every process ends alike."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megadit.runtime.agreement import gathered
from megadit.runtime.environment import LaunchError
from megadit.runtime.launch import Process, process_group
from megadit.runtime.log import setup_logging
from megadit.runtime.status import BAD_INPUT


def run_tool(name: str, work: Callable[[Process], int | None], told: Callable[[str], str] = str) -> int:
    """Do a tool's work together with the other processes that were started; its exit status, as of `answered`."""
    try:
        with process_group() as process:
            setup_logging(process.rank)
            return answered(name, process, work, told)
    except LaunchError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return BAD_INPUT


def answered(
    name: str, process: Process, work: Callable[[Process], int | None], told: Callable[[str], str] = str
) -> int:
    """The exit status of this rank: the work's own (None: 0), or BAD_INPUT after a ValueError, which rank 0 prints.

    Collective, and the work raises a ValueError on all ranks or on none; see `megadit.runtime.agreement`. told: puts
    the message in the tool's words.
    """
    try:
        return work(process) or 0
    except ValueError as error:
        if process.is_main:
            sys.stderr.write(f"{name}: {told(str(error))}\n")
            sys.stderr.flush()
        gathered(None)  # launchers end everyone when the first process exits, so exit after the message
        return BAD_INPUT
