"""Prompts of a file are its lines, or the file is refused by name."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from megadit.sampling.prompts import read_prompts


def test_a_prompt_is_a_line_without_the_white_space_around_it(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff  a seven\r\n\n\tsieben, schön geschrieben \r\n \n七\x0b\u2028in ink\n".encode())
    with caplog.at_level(logging.INFO, logger="megadit"):
        assert read_prompts(str(path)) == ["a seven", "sieben, schön geschrieben", "七\x0b\u2028in ink"]
    assert f"{path}: 2 of 5 lines are empty, and skipped" in caplog.text


def test_a_dash_is_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo")))
    assert read_prompts("-") == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "it holds no prompt"),
        (b"\n  \n", "it holds no prompt"),
        (b"a seven\n\xff\xfe\n", "line 2 is not UTF-8 text"),
    ],
)
def test_a_file_without_prompts_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_prompts(str(path))
    assert str(path) in str(refused.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="Is a directory"):
        read_prompts(str(tmp_path))
