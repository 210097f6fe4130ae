"""A command on several processes: all end alike, one tells why."""

import contextlib
import io
from functools import partial

import torch

from megadit.runtime.agreement import together
from megadit.runtime.launch import Process
from megadit.runtime.tool import answered, run_tool
from tests.ranks import run_ranks


def work(outcome, process):
    with together():
        if process.rank == 1 and isinstance(outcome, str):
            raise ValueError(outcome)
    return outcome


def ending(rank, world_size, outcome):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        here = Process(rank, world_size, rank, torch.device("cpu"))
        status = answered("draw", here, partial(work, outcome), str.upper)
    return status, errors.getvalue()


def test_the_first_process_tells_what_another_refused():
    assert run_ranks(ending, 3, "no such run") == [(2, "draw: NO SUCH RUN\n"), (2, ""), (2, "")]


def test_the_status_is_the_works():
    assert run_ranks(ending, 2, None) == [(0, "")] * 2
    assert run_ranks(ending, 2, 1) == [(1, "")] * 2


def test_a_launcher_that_contradicts_itself_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run_tool("draw", lambda process: None) == 2
    expected = "draw: the environment sets RANK but not WORLD_SIZE; a launcher sets both\n"
    assert capsys.readouterr().err == expected
