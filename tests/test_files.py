"""Atomic writing: a file is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastalex.errors import OutputError
from fastalex.files import replacing, write_text


def test_writing_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_durable_write_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    path = tmp_path / "a.txt"
    write_text(path, "first", durable=False)
    assert (path.read_text(), len(flushed)) == ("first", 0)
    write_text(path, "second")
    assert (path.read_text(), len(flushed)) == ("second", 2)  # the file and its folder


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OutputError, match=r"file/a\.txt: cannot be written"):
        write_text(blocker / "a.txt", "x")


def test_a_full_disk_is_reported_and_the_old_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with (
        pytest.raises(OutputError, match="No space left"),
        replacing(path),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
