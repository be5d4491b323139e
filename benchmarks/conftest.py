"""Options of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastalex benchmarks")
    group.addoption(
        "--data-root",
        type=Path,
        default=CIFAR10 if CIFAR10.is_dir() else None,
        help="test_step.py: CIFAR-10, as pickles or {train,test}/CLASS/*.jpg; generated images if not given",
    )
    group.addoption("--rounds", type=int, default=5, help="test_step.py: turns of each program")
