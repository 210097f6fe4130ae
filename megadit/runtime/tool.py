"""A command on one process or several: what is refused is one line on stderr, and every process ends alike.

A tool's file begins with its command line, which is read before the imports that take seconds: so --help and refused
arguments are answered at once (`refuse_early`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from megadit.runtime.environment import LaunchError, discover
from megadit.runtime.log import setup_logging
from megadit.runtime.status import BAD_INPUT

if TYPE_CHECKING:
    from megadit.runtime.launch import Process


def refuse_early(name: str, check: Callable[[], object], told: Callable[[str], str] = str) -> None:
    """End this process with one line and BAD_INPUT where `check` raises a ValueError or an OSError.

    For what a tool can refuse before its slow imports; what does the work checks it again. Several processes are not
    refused here: they find out together, so that one of them reports it (`run_tool`).
    """
    try:
        if discover(os.environ)[1] > 1:
            return
    except LaunchError:
        return  # for the work to report
    try:
        check()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{name}: {told(str(error))}\n")
        sys.exit(BAD_INPUT)


def run_tool(name: str, work: Callable[[Process], int | None], told: Callable[[str], str] = str) -> int:
    """Do a tool's work together with the other processes that were started; its exit status, as of `answered`."""
    from megadit.runtime.launch import process_group

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
    from megadit.runtime.agreement import gathered

    try:
        return work(process) or 0
    except ValueError as error:
        if process.is_main:
            sys.stderr.write(f"{name}: {told(str(error))}\n")
            sys.stderr.flush()
        gathered(None)  # launchers end everyone when the first process exits, so exit after the message
        return BAD_INPUT
