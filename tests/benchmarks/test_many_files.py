"""The measurement of a folder of very many files, with few."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import many_files
from benchmarks.report import read_measurements


@pytest.mark.parametrize("program", [many_files.FIRST, many_files.PLAIN])
def test_a_first_batch_is_measured(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(many_files, "CLASSES", 2)
    monkeypatch.setattr(many_files, "BATCH", 4)
    root = tmp_path / "images"
    many_files.make_tree(root, 40)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) == 40
    assert len({path.stat().st_ino for path in files}) == 2  # they take no room
    seconds, megabytes = many_files.measure(program, root)
    assert seconds > 0
    assert megabytes >= 0


def test_the_page_is_generated_from_the_committed_measurements() -> None:
    text = many_files.PAGE.read_text()
    measured = read_measurements(many_files.RECORDS.read_text())
    assert text == many_files.page(text, measured), "run python -m benchmarks.many_files"
