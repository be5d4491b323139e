"""The table of faults: generated from the tests' reports, and equal to the committed records."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import faults

TESTS = """
import pytest

@pytest.mark.parametrize("repeat", range(3))
def test_a(repeat):
    assert repeat != 1

def test_b(record_property):
    record_property("tries", 20)
    record_property("losses", 0)
    record_property("note", "11 within a write")

@pytest.fixture
def count(record_property):
    yield
    record_property("tries", 5)
    record_property("losses", 2)

def test_c(count):
    assert False

def test_d():
    pytest.skip("not here")

def test_e(record_property):
    record_property("tries", 7)
    record_property("losses", 0)
    assert False, "after the tries"
"""


def test_tries_and_losses_are_read_from_pytests_report(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    options = ["-o", "junit_family=xunit1", f"--junitxml={report}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "test_x.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    assert faults.tally(report.read_text()) == {
        "test_x.py::test_a": (3, 1, ""),
        "test_x.py::test_b": (20, 0, "11 within a write"),
        "test_x.py::test_c": (5, 2, ""),
        "test_x.py::test_e": (7, 1, ""),
    }


def test_every_row_has_a_test() -> None:
    for fault in faults.FAULTS.values():
        path, _, function = fault.test.partition("::")
        tree = ast.parse((faults.ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_is_generated_from_the_committed_records() -> None:
    text = faults.PAGE.read_text()
    records = faults.read(faults.RECORDS)
    assert text == faults.page(text, records), "run python -m benchmarks.faults"
    assert {name: record["test"] for name, record in records.items()} == {
        name: fault.test for name, fault in faults.FAULTS.items()
    }


def test_a_row_shows_its_record_and_a_loss() -> None:
    about = dict.fromkeys(("hardware", "system", "python", "torch", "date"), "")
    record = {"fault": "kill", "tries": "2000", "losses": "3", "note": "11 within a write", **about}
    lines = faults.page(f"# A page\n{faults.BEGIN}\nold\n{faults.END}\nmore\n", {"kill": record}).splitlines()
    (row,) = (line for line in lines if "`kill -9`" in line)
    assert row.endswith("| 2,000, 11 within a write | 3 | `make faults ARGS=kill` |")
    assert (lines[0], lines[-1]) == ("# A page", "more")
    assert "old" not in lines


def test_an_unknown_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        faults.main(["flood"])
    assert "error: flood: no such fault; one of kill, " in capsys.readouterr().err
