"""One voice: the main process speaks, the others only report errors."""

import logging

import pytest

from megadit.runtime.log import setup_logging


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    loggers = [logging.getLogger(name) for name in ("megadit", "DeepSpeed", "torch.distributed.pipelining")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize(("rank", "heard"), [(0, ["info", "warning", "error"]), (1, ["error"]), (7, ["error"])])
def test_only_the_main_process_says_more_than_errors(rank, heard, capsys):
    setup_logging(rank)
    for name in ("megadit", "megadit.training.loop"):
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger(name), level)(level)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" ", 1)[1] for line in err.splitlines()] == heard * 2


def test_set_up_twice_it_speaks_once(capsys):
    setup_logging(0)
    setup_logging(0).info("note")
    assert capsys.readouterr().err.count("note") == 1


def test_nothing_goes_to_the_root_logger_and_libraries_only_report_errors(capsys, caplog):
    setup_logging(0).warning("ours")
    for library in ("DeepSpeed", "torch.distributed.pipelining"):
        logging.getLogger(library).warning("chatter")
        logging.getLogger(library).error("trouble")
    assert [record.message for record in caplog.records] == ["trouble", "trouble"]
