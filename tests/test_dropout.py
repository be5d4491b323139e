"""The network's dropout, against the distribution that it has to have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastalex.models.dropout import Dropout

DEVIATIONS = 5.0
"""By how many standard deviations a count may miss its expectation: by chance, once in two million."""


def kept(layer: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drop units of ones; return which are kept, and assert that those have one value."""
    out = layer(torch.ones(shape, dtype=dtype))
    assert out.dtype == dtype
    assert out.shape == shape
    assert len(out.unique()) <= 2
    return out != 0


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("p", [0.5, 0.3, 0.001, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_drops_a_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    shape = 250, 4001  # no multiple of the four that share a number
    layer = Dropout(p)
    units = math.prod(shape)
    found = kept(layer, *shape, dtype=dtype)
    spread = math.sqrt(units * p * (1 - p)) * DEVIATIONS
    assert abs(found.sum().item() - units * (1 - p)) < spread + units * 2**-17  # p is rounded
    value = layer(torch.ones(shape, dtype=dtype)).max().item()
    assert value == pytest.approx(1 / (1 - p), rel=2**-16 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 2048, 4096])
def test_units_are_independent(distance: int) -> None:
    """Also those that share a random number, and the same unit of two images."""
    found = kept(Dropout(0.5), 128, 4096).flatten()
    agree = (found[:-distance] == found[distance:]).sum().item()
    pairs = len(found) - distance
    assert abs(agree - pairs / 2) < DEVIATIONS * math.sqrt(pairs) / 2


def test_the_seed_decides() -> None:
    first, second = (kept(Dropout(0.5), 8, 64) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(kept(Dropout(0.5), 8, 64), first)
    assert not torch.equal(first, second)


def test_the_gradient_passes_through_the_units_that_are_kept() -> None:
    x = torch.randn(16, 33, requires_grad=True)
    out = Dropout(0.25)(x)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(gradient * x, out)
    assert (gradient == 0).any()


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0)], ids=["evaluation", "p=0"])
def test_nothing_is_dropped(layer: nn.Module) -> None:
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("p", [1.0, 1 - 2**-30])
def test_everything_is_dropped(p: float) -> None:
    assert not Dropout(p)(torch.ones(4, 5)).any()


def test_compiled_code_has_one_graph() -> None:
    layer = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")
    found = kept(layer, 64, 64)
    assert 0 < found.sum() < found.numel()
