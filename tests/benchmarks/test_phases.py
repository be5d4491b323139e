"""The phases of a harvest on a card, as commands."""

from __future__ import annotations

from pathlib import Path

from benchmarks.card.phases import PHASES
from benchmarks.card.place import Place
from fastalex.study.rows import CLAIMS, select


def test_the_claims_are_divided_over_processes_each_row_once(tmp_path: Path) -> None:
    commands = PHASES["claims"].commands(Place(tmp_path, tmp_path, toy=False))
    rows = [
        argument.removeprefix("rows=") for command in commands for argument in command if "rows=" in argument
    ]
    assert len(rows) == len(commands) > 1
    assert sorted(",".join(rows).split(",")) == sorted(select([CLAIMS]))
