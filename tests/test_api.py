"""The public interface: what ``import fastalex`` gives, and the examples that use it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastalex
from tests import ranks
from tests.tolerances import SAFETY, usual_sum_error

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example as a program of its own, but in this process; return what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_each_name_is_there_and_the_version_is_that_of_the_package() -> None:
    for name in fastalex.__all__:
        assert getattr(fastalex, name) is not None
        assert name in dir(fastalex)
    assert fastalex.__version__ == version("fastalex")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastalex.nothing  # noqa: B018


def test_importing_it_imports_no_other_package() -> None:
    """So it takes no longer than ``import torch``, which it leaves to the names that need it."""
    program = "import sys; before = set(sys.modules); import fastalex; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()}
    assert not packages & {"torch", "torchvision", "numpy", "numba", "hydra", "omegaconf", "matplotlib"}


def test_a_kernel_in_ones_own_network(example: Callable[..., str]) -> None:
    out = example("own_network.py", "10")
    difference = re.search(r"largest difference to plain PyTorch: (\S+)", out)
    assert difference is not None
    # Logits are less than one; the longest sums are over the taps and channels of the second convolution.
    assert float(difference[1]) < SAFETY * usual_sum_error(torch.float32, 9 * 32)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]


def test_a_data_set_of_ones_own(example: Callable[..., str]) -> None:
    out = example("own_data_set.py", "2")
    errors = [float(error) for error in re.findall(r"(?:single crop|ten-crop) +(\S+)", out)]
    assert len(errors) == 2
    assert max(errors) < 0.25  # of two classes that noise does not hide


@pytest.mark.slow
def test_a_training_loop_of_ones_own(example: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer hidden units than the example has, which take most of its time."""

    def narrow(name: str, classes: int, **options: Any) -> nn.Module:
        assert (name, options) == ("alexnet", {"init": "he", "dropout": 0.0})  # which this one has
        return ranks.narrow_alexnet(classes)

    monkeypatch.setattr(fastalex, "create_model", narrow, raising=False)
    out = example("own_training_loop.py", "2")
    errors = [float(error) for error in re.findall(r"test error (\S+)", out)]
    assert len(errors) == 2
    assert errors[-1] < 0.6  # chance is 0.9
