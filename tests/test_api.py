"""The public interface: what ``import fastalex`` gives, and the examples that use it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fastalex

EXAMPLES = Path(__file__).parents[1] / "examples"


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    packages = {name.split(".")[0] for name in python("-c", program).split()}
    assert not packages & {"torch", "torchvision", "numpy", "numba", "hydra", "omegaconf", "matplotlib"}


def test_a_kernel_in_ones_own_network() -> None:
    out = python(str(EXAMPLES / "own_network.py"), "10")
    difference = re.search(r"largest difference to plain PyTorch: (\S+)", out)
    assert difference is not None
    assert float(difference[1]) < 1e-4  # fp32 with another order of sums, on activations of about one
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]


def test_a_data_set_of_ones_own() -> None:
    out = python(str(EXAMPLES / "own_data_set.py"), "2")
    errors = [float(error) for error in re.findall(r"(?:single crop|ten-crop) +(\S+)", out)]
    assert len(errors) == 2
    assert max(errors) < 0.25  # of two classes that noise does not hide


@pytest.mark.slow
def test_a_training_loop_of_ones_own() -> None:
    out = python(str(EXAMPLES / "own_training_loop.py"), "2")
    errors = [float(error) for error in re.findall(r"test error (\S+)", out)]
    assert len(errors) == 2
    assert errors[-1] < 0.6  # chance is 0.9
