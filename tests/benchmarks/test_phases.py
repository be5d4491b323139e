"""The phases of a harvest on a card, as commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.card import agreement
from benchmarks.card.__main__ import ROOT, harvest
from benchmarks.card.agreement import Size
from benchmarks.card.phases import GPU_TESTS, PHASES, Phase
from benchmarks.card.place import Place
from benchmarks.card.throughput import works
from fastalex.study.rows import CLAIMS, select


def test_the_claims_are_divided_over_processes_each_row_once(tmp_path: Path) -> None:
    commands = PHASES["claims"].commands(Place(tmp_path, tmp_path, toy=False))
    rows = [
        argument.removeprefix("rows=") for command in commands for argument in command if "rows=" in argument
    ]
    assert len(rows) == len(commands) > 1
    assert sorted(",".join(rows).split(",")) == sorted(select([CLAIMS]))


def test_the_files_of_the_gpu_tests_are_those_that_have_some() -> None:
    """But the test of a second card, and DALI's, which the machines with a card did not have."""
    of_gpu = re.compile(r"^@pytest\.mark\.gpu|marks=pytest\.mark\.gpu", re.MULTILINE)
    files = {path for path in (ROOT / "tests").rglob("test_*.py") if of_gpu.search(path.read_text())}
    listed = [ROOT / where for where in GPU_TESTS]
    assert all(where.exists() for where in listed)
    left = {path.name for path in files if not any(path.is_relative_to(where) for where in listed)}
    assert left == {"test_memory.py", "test_dali.py"}


def test_a_phase_that_cannot_run_costs_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(place: Place) -> list[list[str]]:
        raise ValueError("no such row")

    monkeypatch.setitem(PHASES, "wrong", Phase(10, wrong))
    monkeypatch.setitem(PHASES, "right", Phase(60, lambda place: [[sys.executable, "-c", "print('here')"]]))
    first, second = harvest(Place(tmp_path, tmp_path, toy=True), ["wrong", "right"], 60)
    assert first["status"] == "ValueError: no such row"
    assert second["status"] == "status 0"
    assert (tmp_path / "right.log").read_text() == "here\n"


def test_an_option_that_ends_with_an_error_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    def ask(do: str, **arguments: object) -> float:
        raise RuntimeError("the process of broken ended, status 1")

    workers = {"whole": SimpleNamespace(ask=lambda do, **_: 1.0), "broken": SimpleNamespace(ask=ask)}
    bench: Any = SimpleNamespace(workers=workers, warm_up=1)
    assert [works(bench, name) for name in workers] == [True, False]
    assert capsys.readouterr().out == "the process of broken ended, status 1\n"


def test_a_check_that_ends_with_an_error_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(size: Size, *_: object, **settings: object) -> agreement.Losses:
        if settings.get("accumulate"):
            raise RuntimeError("out of memory")
        return agreement.Losses([1.0] * size.steps, [1.0])

    monkeypatch.setattr(agreement, "train", broken)
    monkeypatch.setattr(agreement, "resumed", broken)
    monkeypatch.setattr(agreement, "dropout_repeats", lambda size, *_, **__: agreement.Losses([0.0, 1.0], []))
    found = {one.name: one for one in agreement.check(Size(4, 63, 2, units=32))}
    assert found["a batch in four parts and whole"].value is None
    assert found["compiled and eager"].passed
    failed = {name for name, one in found.items() if not one.passed}
    assert failed == {
        "a batch in four parts and whole",
        "these, in four parts",
        "losses of one batch that repeat under dropout, runtime.graph=network",
    }
