"""Lines are whole or not there, and strict JSON."""

import json

import pytest

from megadit.runtime.lines import LineFile, read_lines


def test_lines_come_back_as_they_were_with_all_digits(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = LineFile(path)
    written = [{"n": n, "value": n / 3, "text": "a\nb", "list": [1, 2.5], "nothing": None} for n in range(3)]
    for line in written:
        lines.append(line)
        assert read_lines(path)[-1] == line, "it is there at once"
    lines.close()
    assert read_lines(path) == written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null_for_every_reader(value, tmp_path):
    lines = LineFile(tmp_path / "lines.jsonl")
    lines.append({"loss": value, "stats": {"load": [value, 1.0]}})
    lines.close()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / "lines.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"loss": None, "stats": {"load": [None, 1.0]}}


def test_a_file_goes_on_with_the_lines_that_are_kept(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": 3}\n{"n": 4, "cut')
    lines = LineFile(path, keep=lambda line: line["n"] != 2)
    lines.append({"n": 5})
    lines.close()
    assert read_lines(path) == [{"n": 1}, {"n": 3}, {"n": 5}]
    assert [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]
