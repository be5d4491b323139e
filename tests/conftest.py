"""What tests share."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hydra._internal.hydra import Hydra

from fastalex.models import MODELS
from fastalex.training import flops
from tests import tiny
from tests.compiling import Compiler

# The files that take longest, by their processor time. Workers get files in turn: with a long one at the end,
# one of them would work alone.
LONGEST = (
    "test_distributed.py",  # it and test_nodes.py wait for other processes: not both at the same time
    "test_inspect.py",
    "test_same_mathematics.py",
    "test_api.py",
    "test_nodes.py",
    "test_rank_runs.py",
    "test_lrn.py",
    "test_models.py",
    "test_faults.py",
    "test_reproduce.py",
    "test_train.py",
    "test_resume.py",
    "test_fine_tuning.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, and skip what needs a GPU where there is none."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: places.get(item.path.name, len(LONGEST))
    )  # which keeps the order within a file
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def small_matrix_product() -> Iterator[None]:
    """Measure the processor's peak rate by a small product: by a large one it takes half of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flops.MATMUL_SIZE, "cpu", 64)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_composition() -> Iterator[None]:
    """Compose a command's configuration once: Hydra does it once more for a mode that none of ours has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", lambda self, config_name, overrides: None)
        yield


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Leave the next test as many threads: a runtime sets them, and sums are rounded in their order."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_default_dtype() -> Iterator[None]:
    """Leave the next test the dtype that tensors have by default."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def tiny_network() -> Iterator[None]:
    """Have ``model.name=tiny`` name the network of ``tests/tiny.py``, which takes no time."""
    with mock.patch.dict(MODELS):
        tiny.register()
        yield


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """What torch.compile compiles with; the limits that a runtime sets for good are as before afterwards."""
    config = torch._dynamo.config
    limits = {name: getattr(config, name) for name in ("recompile_limit", "fail_on_recompile_limit_hit")}
    with config.patch(limits):
        yield Compiler(monkeypatch)
    torch.compiler.reset()
