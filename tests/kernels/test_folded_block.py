"""The fused first block against the operators that it combines, and against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastalex.kernels import folded_conv2d, folded_conv2d_relu_lrn_max_pool, relu_lrn_max_pool
from fastalex.kernels.folded_block import IMAGES, _block
from tests.kernels.augment_cases import MEAN, STD, in_float64, sample
from tests.tolerances import NOISE, assert_as_accurate, relative_error, usual_sum_error

LRN: dict[str, Any] = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
CONVOLUTION = {"stride": 4, "padding": 2}


def case(count: int) -> dict[str, Any]:
    """Images of 8x8 enlarged to 64x64, crops of 56x56: 13x13 outputs of the convolution, 6x6 pooled."""
    generator = torch.Generator().manual_seed(count)
    return {
        **sample(8, 8, 64, 56, count),
        "weight": (torch.randn(96, 3, 11, 11, generator=generator) / 11).requires_grad_(),
        "bias": torch.randn(96, generator=generator).requires_grad_(),
    }


def gradients(result: Tensor, parameters: list[Tensor], grad: Tensor | None = None) -> tuple[Tensor, ...]:
    if grad is None:
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(result, parameters, grad.to(result.dtype))


def weight_and_bias(arguments: dict[str, Any]) -> list[Tensor]:
    return [arguments["weight"], arguments["bias"]]


def assert_same_gradients(found: Sequence[Tensor], expected: Sequence[Tensor], images: int) -> None:
    """Assert that fp32 sums over images and 13 x 13 pixels differ by their order alone; each may err."""
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 2 * usual_sum_error(torch.float32, images * 13 * 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, IMAGES, 2 * IMAGES + 3])
def test_agrees_with_the_operators_that_it_combines(count: int, dtype: torch.dtype) -> None:
    arguments = case(count)
    found = folded_conv2d_relu_lrn_max_pool(**arguments, **CONVOLUTION, **LRN, dtype=dtype)
    expected = relu_lrn_max_pool(folded_conv2d(**arguments, **CONVOLUTION, dtype=dtype), **LRN)
    assert found.shape == (count, 96, 6, 6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected)
    ours, theirs = (gradients(result, weight_and_bias(arguments)) for result in (found, expected))
    assert_same_gradients(ours, theirs, count)


def test_agrees_with_float64() -> None:
    """As accurate as plain PyTorch; no gradient reaches windows whose maximum rounding decides."""
    arguments = case(IMAGES + 1)
    found = folded_conv2d_relu_lrn_max_pool(**arguments, **CONVOLUTION, **LRN, dtype=torch.float32)
    crops = in_float64(**{name: arguments[name] for name in arguments if name not in ("weight", "bias")})
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(found.shape, generator=generator)
    results = [(found, arguments["weight"], arguments["bias"])]
    for dtype in (torch.float32, torch.float64):
        weight, bias = (arguments[name].detach().to(dtype).requires_grad_() for name in ("weight", "bias"))
        convolved = F.conv2d(crops.to(dtype), weight, bias, **CONVOLUTION)
        normalised = F.local_response_norm(F.relu(convolved), **LRN)
        results.append((F.max_pool2d(normalised, 3, stride=2), weight, bias))
    first, second = normalised.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2).topk(2).values.unbind(-1)
    close = (first - second < NOISE * normalised.square().mean().sqrt()) & (first > 0)
    assert close.double().mean() < 1e-3
    grad[close] = 0
    ours, plain, exact = (
        dict(zip(("result", "weight", "bias"), (result, *gradients(result, each, grad)), strict=True))
        for result, *each in results
    )
    # The longest sums are those of the gradients, over all outputs of the convolution.
    floor = usual_sum_error(torch.float32, convolved[:, 0].numel())
    assert_as_accurate(ours, [plain], exact, floor=floor)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_default_dtype_does_not_matter(default: torch.dtype) -> None:
    arguments = case(2)
    results = []
    for each in (torch.float32, default):
        torch.set_default_dtype(each)
        found = folded_conv2d_relu_lrn_max_pool(**arguments, **CONVOLUTION, **LRN, dtype=torch.float32)
        grad = torch.ones_like(found)
        grads = torch.autograd.grad(found, (arguments["weight"], arguments["bias"]), grad)
        results.append((found, *grads))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_compiles_without_graph_breaks_under_autocast() -> None:
    """Autocast rounds nothing inside: the arithmetic stays fp32."""
    arguments = case(2)

    def forward(weight: Tensor, bias: Tensor) -> Tensor:
        given = {**arguments, "weight": weight, "bias": bias}
        return folded_conv2d_relu_lrn_max_pool(**given, **CONVOLUTION, **LRN, dtype=torch.bfloat16)

    convolved = folded_conv2d(**arguments, **CONVOLUTION, dtype=torch.bfloat16)
    expected = relu_lrn_max_pool(convolved, **LRN)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        found = compiled(arguments["weight"], arguments["bias"])
    assert torch.equal(found, expected)
    ours, theirs = (gradients(result, weight_and_bias(arguments)) for result in (found, expected))
    assert_same_gradients(ours, theirs, 2)


def test_saves_at_most_a_quarter_of_its_result() -> None:
    arguments = case(2 * IMAGES)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = folded_conv2d_relu_lrn_max_pool(**arguments, **CONVOLUTION, **LRN, dtype=torch.float32)
    given = {each.data_ptr() for each in arguments.values() if isinstance(each, Tensor)}
    added = [each for each in saved if each.data_ptr() not in given]
    assert added  # the hook has been called
    assert sum(each.nbytes for each in added) * 4 <= found.nbytes


def test_number_of_threads() -> None:
    arguments = case(IMAGES + 1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = folded_conv2d_relu_lrn_max_pool(**arguments, **CONVOLUTION, **LRN, dtype=torch.float32)
            results.append((found.detach(), *gradients(found, weight_and_bias(arguments))))
    finally:
        torch.set_num_threads(before)
    (one, *ours), (several, *theirs) = results
    assert torch.equal(one, several)  # no sum crosses threads
    assert_same_gradients(ours, theirs, IMAGES + 1)


def test_empty_batch() -> None:
    arguments = case(4)
    arguments.update({name: arguments[name][:0] for name in ("offsets", "flips", "indices", "colors")})
    found = folded_conv2d_relu_lrn_max_pool(**arguments, **CONVOLUTION, **LRN, dtype=torch.bfloat16)
    assert found.shape == (0, 96, 6, 6)
    assert not any(each.any() for each in gradients(found, weight_and_bias(arguments)))


def test_operator() -> None:
    arguments = case(2)
    tensors = [
        arguments[name] for name in ("images", "indices", "offsets", "flips", "colors", "weight", "bias")
    ]
    opcheck(_block, (*tensors, 64, 56, MEAN, STD, 4, 2, torch.float32, 5, 5e-4, 0.75, 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": 60}, "resize must be a whole multiple of the images' height and width, got 60 for 8 x 8"),
        ({"flips": torch.zeros(3, dtype=torch.bool)}, r"flips must be torch.bool \(4,\) on cpu"),
        ({"stride": 40}, r"height and width must be at least 3, got \(4, 96, 2, 2\)"),
        ({"size": 0}, "size must be a whole number of channels, at least 1, got 0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {**case(4), **CONVOLUTION, **LRN, "dtype": torch.float32, **change}
    with pytest.raises(ValueError, match=f"folded_conv2d_relu_lrn_max_pool: {message}"):
        folded_conv2d_relu_lrn_max_pool(**arguments)


def test_second_derivatives_are_refused() -> None:
    arguments = case(2)
    found = folded_conv2d_relu_lrn_max_pool(**arguments, **CONVOLUTION, **LRN, dtype=torch.float32)
    (first,) = torch.autograd.grad(found.square().sum(), arguments["weight"], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()
