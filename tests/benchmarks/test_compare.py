"""Comparing results with committed results."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Change
from benchmarks.report import Measurement

HEADER = "case,images_per_s,p20,p80,rounds,hardware\n"


def measurement(median: float, p20: float, p80: float, unit: str = "images/s") -> Measurement:
    return Measurement({"case": "one"}, unit, median, p20, p80, {"hardware": "a machine"})


@pytest.mark.parametrize(
    ("before", "now", "mark"),
    [
        ((100, 98, 102), (110, 108, 112), "better"),
        ((100, 98, 102), (90, 88, 92), "worse"),
        ((100, 98, 102), (104, 103, 105), ""),  # no overlap, but less than 5%
        ((100, 90, 110), (120, 109, 130), ""),  # more than 5%, but overlapping
        ((100, 90, 110), (120, 110, 130), ""),  # they share a point
        ((100, 98, 102), (100, 98, 102), ""),
    ],
)
def test_mark(before: tuple[float, ...], now: tuple[float, ...], mark: str) -> None:
    assert Change(measurement(*before), measurement(*now)).mark == mark
    opposite = {"better": "worse", "worse": "better", "": ""}[mark]
    for unit in ("ms", "MB"):
        assert Change(measurement(*before, unit), measurement(*now, unit)).mark == opposite


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture(name="results")
def committed_results(tmp_path: Path) -> Path:
    """A folder in a git checkout, with two committed files."""
    results = tmp_path / "results"
    results.mkdir()
    git(tmp_path, "init")
    (results / "a.csv").write_text(f"{HEADER}one,100,98,102,5,x\ntwo,100,98,102,5,x\ngone,1,1,1,5,x\n")
    (results / "b.csv").write_text(f"{HEADER}one,100,98,102,5,x\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "results")
    return results


def report(results: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    compare.main([*arguments, "--results", str(results)])
    return capsys.readouterr().out.splitlines()


def test_marks_what_has_moved(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = f"{HEADER}one,150,148,152,5,y\ntwo,99,97,101,5,y\nnew,1,1,1,5,y\n"
    (results / "a.csv").write_text(changed)
    (results / "c.csv").write_text(changed)
    head, machine, one, two, same, added = report(results, capsys)
    assert head == ("a.csv: of 2 measurements 1 better and 0 worse beyond noise; 1 new, 1 gone")
    assert machine == "  not the same machine: x, now y"
    assert re.fullmatch(r" +100 -> +150 images/s +\+50.0%  better  one", one)
    assert re.fullmatch(r" +100 -> +99 images/s +-1.0% +two", two)
    assert same == "b.csv: as in HEAD"
    assert added == "c.csv: not in HEAD"


def test_another_revision(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "b.csv").write_text(f"{HEADER}one,50,49,51,5,x\n")
    git(results, "commit", "-am", "slower")
    assert "b.csv: as in HEAD" in report(results, capsys)
    assert "b.csv: of 1 measurements 0 better and 1 worse beyond noise; 0 new, 0 gone" in report(
        results, capsys, "HEAD~1"
    )


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        compare.main([*arguments])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_errors_name_the_cause(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no revision nosuch" in failure(capsys, "nosuch", "--results", str(results))
    (results / "a.csv").write_text("x,y\n1,2\n")
    assert "a.csv is not a file of results: no columns" in failure(capsys, "--results", str(results))
    (results / "a.csv").write_text(f"{HEADER}one,fast,98,102,5,x\n")
    assert "line 2: could not convert" in failure(capsys, "--results", str(results))
    for path in results.glob("*.csv"):
        path.unlink()
    assert "make bench writes them" in failure(capsys, "--results", str(results))


def test_outside_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text(HEADER)
    assert "not in a git checkout" in failure(capsys, "--results", str(tmp_path))
