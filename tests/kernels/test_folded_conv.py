"""`folded_conv2d` against the resize, crop, flip and convolution of PyTorch, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastalex.kernels import augment, folded_conv2d
from fastalex.kernels import folded_conv_reference as reference
from fastalex.kernels.folded_conv import _folded_conv
from fastalex.kernels.folded_conv_reference import FoldedConv
from tests.kernels.augment_cases import MEAN, STD, in_float64, sample
from tests.tolerances import HALF, SAFETY, assert_near, unit_roundoff, usual_sum_error

# height, width, resize, crop, kernel, stride, padding: AlexNet's on CIFAR-10; a width unlike the height;
# nothing enlarged, where every offset has border and interior; an odd factor; one pixel; a crop without
# interior, and outputs that depend on padding only.
SHAPES = [
    (32, 32, 256, 224, 11, 4, 2),
    (8, 4, 16, 13, 5, 3, 4),
    (8, 8, 8, 6, 3, 1, 1),
    (7, 21, 21, 16, 4, 2, 0),
    (1, 2, 6, 5, 3, 2, 0),
    (5, 5, 10, 7, 3, 2, 4),
]


def case(height: int, width: int, resize: int, crop: int, kernel: int, count: int = 4) -> dict[str, Any]:
    """Arguments of `folded_conv2d` for 96 channels, without stride, padding and dtype."""
    generator = torch.Generator().manual_seed(kernel)
    weight = torch.randn(96, 3, kernel, kernel, generator=generator) / kernel
    bias = torch.randn(96, generator=generator)
    return {**sample(height, width, resize, crop, count), "weight": weight, "bias": bias}


def every_offset(resize: int, crop: int) -> tuple[Tensor, Tensor]:
    """Offsets and flips with every top and every left, flipped and not, and all corners.

    Not every top with every left: the axes are independent.
    """
    limit = resize - crop
    top = torch.arange(limit + 1)
    offsets = torch.cat(
        [
            torch.tensor([[0, 0], [0, limit], [limit, 0], [limit, limit]]),
            torch.stack([top, top.roll(3)], dim=1),
        ]
    ).int()
    return offsets.repeat(2, 1), torch.arange(2 * len(offsets)) < len(offsets)


def plain(
    arguments: dict[str, Any],
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64: the convolution of the enlarged crops, its gradient, and those of weight and bias."""
    weight, bias = (each.detach().double().requires_grad_() for each in (weight, bias))
    crops = in_float64(**{k: v for k, v in arguments.items() if k not in ("weight", "bias")})
    out = F.conv2d(crops, weight, bias, stride, padding)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out.detach(), grad, *torch.autograd.grad(out, (weight, bias), grad)


def source_crops(
    arguments: dict[str, Any], weight: Tensor, bias: Tensor, stride: int, padding: int
) -> reference.SourceCrops:
    """The crops of a folded convolution, in float64."""
    tensors = {**arguments, "weight": weight, "bias": bias}
    convolution = FoldedConv(**tensors, stride=stride, padding=padding, dtype=torch.float64)
    return reference.source_crops(convolution, torch.float64)


def result_error(weight: Tensor) -> float:
    """A bound of the fp32 convolution's error, as a fraction of the largest value."""
    return SAFETY * usual_sum_error(torch.float32, weight[0].numel())


def gradient_error(result: Tensor) -> float:
    """A bound of the error of the gradients, which are sums over all pixels of a channel of the result."""
    return SAFETY * usual_sum_error(torch.float32, result[:, 0].numel())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_exact_for_every_offset_and_flip(shape: tuple[int, ...]) -> None:
    *sizes, kernel, stride, padding = shape
    offsets, flips = every_offset(*sizes[2:])
    arguments = sample(*sizes, count=len(flips))
    arguments.update(offsets=offsets, flips=flips)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, generator=generator, dtype=torch.float64)
    expected, grad, d_weight, d_bias = plain(arguments, weight, bias, stride, padding)

    batch = source_crops(arguments, weight, bias, stride, padding)
    kernels = reference.fold(weight, batch.rows, batch.columns)
    assert_near(reference.folded_conv2d(batch, kernels, bias, torch.float64), expected, HALF)
    d_kernels, found = reference.folded_conv2d_backward(grad, batch)
    assert_near(reference.unfold(d_kernels, batch.rows, batch.columns), d_weight, HALF)
    assert_near(found, d_bias, HALF)


def test_fp32_for_every_phase_and_flip() -> None:
    """The kernel against the float64 reference, which the test above compares with PyTorch.

    The offsets include every remainder by 8 on both axes, the first and the last.
    """
    offsets, flips = every_offset(256, 224)
    chosen = (offsets[:, 0] < 8) | (offsets[:, 0] > 28)
    offsets, flips = offsets[chosen], flips[chosen]
    assert {0, 32} < set(offsets[:, 1].tolist())
    assert len((offsets[:, 1] % 8).unique()) == 8
    arguments = case(32, 32, 256, 224, 11, count=len(flips))
    arguments.update(offsets=offsets, flips=flips)
    weight, bias = (arguments.pop(name).requires_grad_() for name in ("weight", "bias"))
    found = folded_conv2d(**arguments, weight=weight, bias=bias, stride=4, padding=2, dtype=torch.float32)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    d_weight, d_bias = torch.autograd.grad(found, (weight, bias), grad)

    batch = source_crops(arguments, weight, bias, 4, 2)
    with torch.no_grad():
        kernels = reference.fold(weight.double(), batch.rows, batch.columns)
        expected = reference.folded_conv2d(batch, kernels, bias.double(), torch.float64)
        assert_near(found.detach(), expected, result_error(weight))
        d_kernels, expected_d_bias = reference.folded_conv2d_backward(grad.double(), batch)
    assert_near(d_weight, reference.unfold(d_kernels, batch.rows, batch.columns), gradient_error(found))
    assert_near(d_bias, expected_d_bias, gradient_error(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [96, 192, 10])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=str)
def test_agrees_with_float64(shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
    *sizes, kernel, stride, padding = shape
    arguments = case(*sizes, kernel, count=2)  # type: ignore[arg-type]
    weight, bias = (
        arguments.pop(name).repeat(2, *d)[:channels] for name, d in (("weight", (1, 1, 1)), ("bias", ()))
    )
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    found = folded_conv2d(**arguments, weight=weight, bias=bias, stride=stride, padding=padding, dtype=dtype)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(found, (weight, bias), grad)
    expected, _, *expected_grads = plain(arguments, weight, bias, stride, padding, grad.double())
    error = result_error(weight) * expected.abs().max().item()
    torch.testing.assert_close(found.detach().double(), expected, rtol=unit_roundoff(dtype), atol=error)
    for gradient, expected_gradient in zip(grads, expected_grads, strict=True):
        assert gradient.dtype == torch.float32
        assert_near(gradient, expected_gradient, gradient_error(found))


def test_bf16_is_more_accurate_than_a_convolution_under_autocast() -> None:
    """Autocast rounds crops and weight; the folded convolution does not."""
    arguments = case(32, 32, 256, 224, 11)
    expected = plain(arguments, arguments["weight"], arguments["bias"], 4, 2)[0]
    names = ("images", "offsets", "flips", "indices", "colors", "resize", "crop")
    crops = augment(**{name: arguments[name] for name in names}, mean=MEAN, std=STD, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = F.conv2d(crops, arguments["weight"], arguments["bias"], stride=4, padding=2)
        found = folded_conv2d(**arguments, stride=4, padding=2, dtype=torch.bfloat16)
    errors = [(each.double() - expected).square().mean() for each in (found, rounded)]
    assert errors[0] < errors[1]
    error = result_error(arguments["weight"]) * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=unit_roundoff(torch.bfloat16), atol=error)


def test_compiles_without_graph_breaks() -> None:
    arguments = case(8, 8, 64, 56, 11, count=2)
    weight, bias = (arguments.pop(name).requires_grad_() for name in ("weight", "bias"))

    def forward(weight: Tensor, bias: Tensor) -> Tensor:
        return folded_conv2d(
            **arguments, weight=weight, bias=bias, stride=4, padding=2, dtype=torch.float32
        ).relu()

    expected, grad, *_ = plain(arguments, weight, bias, 4, 2)
    found = torch.compile(forward, fullgraph=True, backend="aot_eager")(weight, bias)
    assert_near(found.detach(), expected.relu(), result_error(weight))
    grads = torch.autograd.grad(found, (weight, bias), grad.float())
    expected_grads = plain(arguments, weight, bias, 4, 2, grad * (expected > 0))[2:]
    for gradient, expected_gradient in zip(grads, expected_grads, strict=True):
        assert_near(gradient, expected_gradient, gradient_error(found))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads(threads: int) -> None:
    arguments = case(8, 8, 64, 56, 11, count=5)
    weight, bias = (arguments.pop(name).requires_grad_() for name in ("weight", "bias"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = folded_conv2d(**arguments, weight=weight, bias=bias, stride=4, padding=2, dtype=torch.float32)
        grads = torch.autograd.grad(found.square().sum(), (weight, bias))
    finally:
        torch.set_num_threads(before)
    grad = 2 * found.detach().double()
    expected, _, *expected_grads = plain(arguments, weight, bias, 4, 2, grad)
    assert_near(found.detach(), expected, result_error(weight))
    for gradient, expected_gradient in zip(grads, expected_grads, strict=True):
        assert_near(gradient, expected_gradient, gradient_error(found))


def test_gradient_in_another_layout() -> None:
    arguments = case(8, 8, 64, 56, 11, count=2)
    weight, bias = (arguments.pop(name).requires_grad_() for name in ("weight", "bias"))
    found = folded_conv2d(**arguments, weight=weight, bias=bias, stride=4, padding=2, dtype=torch.float32)
    grad = torch.randn(found.shape).contiguous()
    assert grad.stride() != found.stride()
    contiguous = torch.autograd.grad(found, (weight, bias), grad, retain_graph=True)
    channels_last = torch.autograd.grad(
        found, (weight, bias), grad.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(contiguous, channels_last, rtol=0, atol=0)


def test_empty_batch() -> None:
    arguments = case(8, 8, 64, 56, 11)
    arguments.update({name: arguments[name][:0] for name in ("offsets", "flips", "indices", "colors")})
    weight = arguments["weight"].requires_grad_()
    found = folded_conv2d(**arguments, stride=4, padding=2, dtype=torch.bfloat16)
    assert found.shape == (0, 96, 13, 13)
    found.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_operator() -> None:
    arguments = case(8, 8, 64, 56, 11, count=2)
    weight, bias = (arguments[name].requires_grad_() for name in ("weight", "bias"))
    tensors = [arguments[name] for name in ("images", "indices", "offsets", "flips", "colors")]
    opcheck(_folded_conv, (*tensors, weight, bias, 64, 56, MEAN, STD, 4, 2, torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"resize": 250},
            "resize must be a whole multiple of the images' height and width, got 250 for 32 x 32",
        ),
        ({"weight": torch.zeros(96, 1, 11, 11)}, r"weight must be \(out channels, 3, height, width\), got"),
        ({"weight": torch.zeros(96, 3, 11, 11).double()}, "weight must be float32 on cpu, got torch.float64"),
        ({"bias": torch.zeros(95)}, r"bias must be \(96,\), got \(95,\)"),
        ({"stride": 0}, "stride must be at least 1 and padding at least 0, got 0 and 2"),
        (
            {"weight": torch.zeros(96, 3, 229, 3)},
            r"a kernel of \(229, 3\) does not fit a crop of 224 padded by 2",
        ),
        ({"flips": torch.zeros(3, dtype=torch.bool)}, r"flips must be torch.bool \(4,\) on cpu"),
        ({"offsets": torch.full((4, 2), 33, dtype=torch.int32)}, r"offsets must be in 0 .. 32, got 33 .. 33"),
        ({"indices": torch.full((4,), -1)}, r"indices must be in 0 .. 6, got -1 .. -1"),
        ({"crop": 257}, "crop must be in 1 .. resize"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {**case(32, 32, 256, 224, 11), "stride": 4, "padding": 2, "dtype": torch.float32, **change}
    with pytest.raises(ValueError, match=f"folded_conv2d: {message}"):
        folded_conv2d(**arguments)


def test_a_gradient_that_does_not_fit_is_refused() -> None:
    arguments = case(8, 8, 64, 56, 11, count=2)
    tensors = [arguments[name] for name in ("images", "indices", "offsets", "flips", "colors", "weight")]
    grad = torch.zeros(2, 96, 13, 12)
    with pytest.raises(ValueError, match=r"gradient does not fit.* \(2, 96, 13, 12\).* \(2, 96, 13, 13\)"):
        torch.ops.fastalex.folded_conv_backward(grad, *tensors, 64, 56, MEAN, STD, 4, 2)


def test_second_derivatives_are_refused() -> None:
    arguments = case(8, 8, 64, 56, 11, count=2)
    weight = arguments["weight"].requires_grad_()
    found = folded_conv2d(**arguments, stride=4, padding=2, dtype=torch.float32)
    (first,) = torch.autograd.grad(found.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()
