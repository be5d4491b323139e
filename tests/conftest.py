"""What tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

CIFAR10_JPEG = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Leave the next test as many threads: a runtime sets them, and sums are rounded in their order."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """The folder of CIFAR-10 as JPEG files, where the machine has it."""
    if not CIFAR10_JPEG.is_dir():
        pytest.skip(f"no CIFAR-10 images at {CIFAR10_JPEG}")
    return CIFAR10_JPEG
