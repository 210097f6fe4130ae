"""A file that is replaced is never seen half."""

import os

import pytest

from megadit.runtime.disk import replace_file, write_synced


def test_a_file_gets_its_new_content_and_nothing_is_left(tmp_path):
    path = tmp_path / "file"
    for content in (b"first", b"a longer second", b""):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_kill_before_the_rename_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_synced(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
