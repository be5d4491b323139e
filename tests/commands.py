"""The commands of fastalex, run in the process of the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest

Outcome = tuple[int, str, str]
"""Exit status, standard output and standard error."""


def exit_status(main: Callable[[], None], arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command with these arguments; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fastalex", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def outcome(
    main: Callable[[], None],
    arguments: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Outcome:
    """Run a command with these arguments; return its exit status, and what it printed since the last call."""
    status = exit_status(main, arguments, monkeypatch)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
