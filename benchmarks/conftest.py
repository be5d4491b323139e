"""Options and fixtures of the benchmarks."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from benchmarks.hardware import DEVICE
from benchmarks.images import generate

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise ArgumentTypeError(f"{text} is not a folder")
    return Path(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastalex benchmarks")
    group.addoption(
        "--data-root",
        type=folder,
        default=CIFAR10 if CIFAR10.is_dir() else None,
        help="CIFAR-10, as pickles or {train,test}/CLASS/*.jpg; generated images if not given",
    )
    group.addoption("--rounds", type=count, default=5, help="number of turns of each program")


@pytest.fixture(scope="module")
def enabled(request: pytest.FixtureRequest) -> None:
    """Skip measurements where nothing is to be measured."""
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("a measurement, not a test: needs --benchmark-enable")


@pytest.fixture(scope="module")
def root(enabled: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the images."""
    given: Path | None = request.config.getoption("data_root")
    return (given or generate(tmp_path_factory.mktemp("images"))).absolute()


@pytest.fixture
def cpu_only() -> None:
    """Skip benchmarks of CPU tensors on a machine with a GPU: its results would hold times of the host."""
    if DEVICE != "cpu":
        pytest.skip("times CPU tensors; CUDA_VISIBLE_DEVICES= hides the GPU and measures it")
