"""Files written whole or not at all."""

import os

import pytest

from sparselora_hf.files import write_atomically


def test_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    finally:
        assert os.umask(before) == 0o027


def test_the_temporary_file_lies_beside_it(tmp_path, monkeypatch):
    """A move from another file system would be a copy, which can be stopped in between."""
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: moved.append(os.path.dirname(old)) or replace(old, new))
    write_atomically(tmp_path / "file", b"")
    assert moved == [str(tmp_path)]


def test_an_error_is_the_first_one(tmp_path, monkeypatch):
    """Though the temporary file cannot be taken away either."""

    def fail(old, new):
        os.remove(old)
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
