"""`winograd_conv2d` against PyTorch's convolution in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastalex.kernels import winograd, winograd_conv2d, winograd_numba_bf16, winograd_numba_bf16_one_axis
from fastalex.kernels import winograd_reference as reference
from fastalex.kernels._numba_simd import LANES
from fastalex.kernels.winograd import CHANNELS, TAPS, _implementation, _winograd
from tests.tolerances import HALF, SAFETY, assert_as_accurate, assert_near, unit_roundoff, usual_sum_error

SIZES = [(13, 13), (5, 7), (6, 4), (2, 3), (1, 1), (1, 8)]
TILES = [(outputs, taps) for taps in TAPS for outputs in range(2, reference.LARGEST_TILE - taps + 2)]
Convolution = Callable[..., Tensor]


def case(
    images: int, channels: int, out_channels: int, height: int, width: int, taps: int = 3
) -> tuple[Tensor, ...]:
    """x, weight, bias and a gradient of the result. x and the gradient are exact in bf16.

    x is noise after ReLU and the weight has He initialisation, as in AlexNet's layers before training.
    """
    generator = torch.Generator().manual_seed(height)
    shapes = (
        (images, channels, height, width),
        (out_channels, channels, taps, taps),
        (out_channels,),
        (images, out_channels, height, width),
    )
    x, weight, bias, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    weight *= (2 / (taps**2 * channels)) ** 0.5
    return x.relu().bfloat16().float(), weight, bias, grad.bfloat16().float()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def results(convolution: Convolution, *arguments: Tensor) -> list[Tensor]:
    """The convolution's result and its inputs' gradients; the last argument is the result's gradient."""
    *given, grad = arguments
    inputs = [each.detach().clone().requires_grad_() for each in given]
    out = convolution(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def exact(*arguments: Tensor) -> list[Tensor]:
    return results(plain, *(each.double() for each in arguments))


def amplification(last: Tensor, first: Tensor, second: Tensor, axes: int = 2) -> float:
    """By what factor Winograd's algorithm along two axes, or along one, increases the error of its products.

    `last @ ((first @ a) * (second @ b))` is a convolution of `a` and `b`: each result is a sum of as many
    products as the shorter of them has values. If these are random with variance 1, `first @ a` and
    `second @ b` have their rows' squared norms as variances, and relative errors of their products give the
    result errors of variance `last**2 @ (squared norms of first * squared norms of second)`.
    """
    norms = first.square().sum(1) * second.square().sum(1)
    products = min(first.shape[1], second.shape[1])
    return ((last.square() @ norms).max().item() / products) ** (axes / 2)


def amplifications(x: Tensor, weight: Tensor) -> tuple[float, float]:
    """:func:`amplification` of the convolution, and of the gradient of its weight."""
    (height, width), taps, axes = x.shape[2:], weight.shape[2], 2
    implementation = _implementation(x, weight)
    if implementation is winograd_numba_bf16:
        outputs = winograd_numba_bf16.OUTPUTS
    elif implementation is winograd_numba_bf16_one_axis:
        outputs, axes = winograd_numba_bf16_one_axis.outputs_per_tile(height, taps), 1
    else:
        outputs = reference.outputs_per_tile(height, width, taps)
    input, side, output = reference.matrices(outputs, taps)
    return amplification(output, side, input, axes), amplification(side.t(), output.t(), input, axes)


def bounds(found: list[Tensor]) -> list[float]:
    """Bounds of the error of each result, as fractions of its largest value.

    Sums are in fp32, so bf16 rounds only their terms' factors, and the sums before they become outputs.

    Args:
        found: the convolution's result, and the gradients of x, weight and, if there is one, bias.
    """
    images, out_channels, *size = found[0].shape
    channels, taps = found[2].shape[1:3]
    pixels = images * math.prod(size)
    forward, backward = amplifications(*found[1:3])
    sums = [
        (forward, channels * taps**2),
        (forward, out_channels * taps**2),
        (backward, pixels),
        (1.0, pixels),
    ]
    rounding = unit_roundoff(torch.bfloat16) if found[0].dtype == torch.bfloat16 else 0.0
    errors = [factor * (usual_sum_error(torch.float32, terms) + rounding) for factor, terms in sums]
    return [SAFETY * error for error in errors[: len(found)]]


@pytest.mark.parametrize(("outputs", "taps"), TILES)
@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_exact(size: tuple[int, int], images: int, outputs: int, taps: int) -> None:
    x, weight, bias, grad = (each.double() for each in case(images, 5, 7, *size, taps))
    found = [
        reference.winograd_conv2d(x, weight, bias, outputs),
        *reference.winograd_conv2d_backward(grad, x, weight, outputs=outputs),
    ]
    for result, expected in zip(found, exact(x, weight, bias, grad), strict=True):
        assert_near(result, expected, HALF)


def test_matrices_of_the_smallest_tile_agree_with_lavin_and_gray() -> None:
    """arXiv:1509.09308, section 4.1, except the sign of the last row of B^T and the last column of A^T."""
    input, weight, output = reference.matrices(2, 3)
    assert input.tolist() == [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
    assert weight.tolist() == [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    assert output.tolist() == [[1, 1, 1, 0], [0, 1, -1, 1]]


@pytest.mark.parametrize(
    ("size", "taps", "products"),
    [  # AlexNet's convolutions at 224 and 112 pixels
        ((27, 27), 5, 7 * 7 * 8 * 8),
        ((13, 13), 5, 4 * 4 * 8 * 8),
        ((13, 13), 3, 3 * 3 * 7 * 7),
        ((6, 6), 3, 2 * 2 * 5 * 5),
        ((3, 3), 3, 5 * 5),
    ],
)
def test_tiles_take_few_products(size: tuple[int, int], taps: int, products: int) -> None:
    outputs = reference.outputs_per_tile(*size, taps)
    tiles = -(-size[0] // outputs) * -(-size[1] // outputs)
    assert tiles * (outputs + taps - 1) ** 2 == products


@pytest.mark.parametrize("channels", [(32, 48), (16, 16), (10, 16), (16, 3)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp32(size: tuple[int, int], channels: tuple[int, int]) -> None:
    arguments = case(2, *channels, *size)
    found = results(winograd_conv2d, *arguments)
    assert {each.dtype for each in found} == {torch.float32}
    assert_all_near(found, exact(*arguments))


@pytest.mark.parametrize("channels", [(96, 256), (16, 16), (10, 16), (16, 3)], ids=str)
@pytest.mark.parametrize("size", [(27, 27), *SIZES], ids=str)
def test_5x5_in_fp32(size: tuple[int, int], channels: tuple[int, int]) -> None:
    arguments = case(2, *channels, *size, 5)
    found = results(winograd_conv2d, *arguments)
    assert {each.dtype for each in found} == {torch.float32}
    assert_all_near(found, exact(*arguments))


@pytest.mark.parametrize(
    ("channels", "taps"),
    [((256, 384), 3), ((384, 256), 3), ((64, 64), 3), ((10, 3), 3), ((96, 256), 5), ((10, 3), 5)],
    ids=str,
)
def test_bf16_is_as_accurate_as_a_plain_convolution(channels: tuple[int, int], taps: int) -> None:
    """The result and all gradients, under autocast, but for what Winograd's algorithm makes of roundings."""
    x, weight, bias, grad = case(3, *channels, 13, 13, taps)
    arguments = channels_last(x.bfloat16()), channels_last(weight), bias, grad.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, usual = (results(each, *arguments) for each in (winograd_conv2d, plain))
    assert [each.dtype for each in found] == [each.dtype for each in usual]
    ours, theirs, truth = (
        dict(zip(("result", "x", "weight", "bias"), each, strict=True))
        for each in (found, usual, exact(x, weight, bias, grad))
    )
    factor = max(SAFETY, *amplifications(x.bfloat16(), weight))
    assert_as_accurate(ours, [theirs], truth, floor=unit_roundoff(torch.bfloat16), factor=factor)


def in_dtype(dtype: torch.dtype, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The arguments with x and the gradient in `dtype`, which represents them exactly."""
    x, *rest, grad = arguments
    return x.to(dtype), *rest, grad.to(dtype)


def assert_all_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for result, truth, bound in zip(found, expected, bounds(found), strict=True):
        rounding = unit_roundoff(torch.bfloat16) if result.dtype == torch.bfloat16 else 0.0
        assert_near(result, truth, bound + rounding)


both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("channels", [(256, 48), (32, 48), (16, 16), (10, 16), (16, 3)], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (2, 2), (8, 1), (14, 14)], ids=str)
@pytest.mark.parametrize("taps", TAPS)
def test_bf16(taps: int, size: tuple[int, int], channels: tuple[int, int]) -> None:
    """Both algorithms for 3x3, that for 5x5, and the reference where channels are no multiples of 16."""
    arguments = case(2, *channels, *size, taps)
    found = results(winograd_conv2d, *in_dtype(torch.bfloat16, arguments))
    assert [each.dtype for each in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert_all_near(found, exact(*arguments))


@both
@pytest.mark.parametrize("images", [0, 1, 90])
@pytest.mark.parametrize(("channels", "taps"), [(16, 3), (16, 5), (256, 3)])
def test_number_of_images(channels: int, images: int, taps: int, dtype: torch.dtype) -> None:
    """Also more than are processed at a time: in bf16 64 and 85 along one axis, and 64; fewer in fp32."""
    arguments = case(images, channels, 16, 16, 16, taps)
    found = results(winograd_conv2d, *in_dtype(dtype, arguments))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_all_near(found, exact(*arguments))


@both
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("channels", [16, 256])
def test_number_of_threads(channels: int, threads: int, dtype: torch.dtype) -> None:
    arguments = case(5, channels, 32, 7, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = results(winograd_conv2d, *in_dtype(dtype, arguments))
    finally:
        torch.set_num_threads(before)
    assert_all_near(found, exact(*arguments))


@both
def test_memory_format_does_not_matter(dtype: torch.dtype) -> None:
    x, weight, bias, grad = in_dtype(dtype, case(2, 16, 32, 5, 6))
    contiguous = results(winograd_conv2d, x, weight, bias, grad)
    expected = results(
        winograd_conv2d, *(channels_last(each) for each in (x, weight)), bias, channels_last(grad)
    )
    torch.testing.assert_close(contiguous, expected, rtol=0, atol=0)


@both
@pytest.mark.parametrize("taps", TAPS)
def test_without_bias(taps: int, dtype: torch.dtype) -> None:
    x, weight, _, grad = in_dtype(dtype, case(2, 16, 32, 5, 6, taps))
    found = results(partial(winograd_conv2d, bias=None), x, weight, grad)
    usual = partial(F.conv2d, padding=taps // 2)
    expected = results(usual, x.double(), weight.double(), grad.double())
    assert_all_near(found, expected)


@both
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("taps", TAPS)
def test_default_dtype_does_not_matter(taps: int, default: torch.dtype, dtype: torch.dtype) -> None:
    arguments = in_dtype(dtype, case(2, 16, 32, 5, 6, taps))
    expected = results(winograd_conv2d, *arguments)
    torch.set_default_dtype(default)
    found = results(winograd_conv2d, *arguments)
    for result, same in zip(found, expected, strict=True):
        assert torch.equal(result, same)


@both
@pytest.mark.parametrize("taps", TAPS)
def test_compiles_without_graph_breaks_under_autocast(taps: int, dtype: torch.dtype) -> None:
    x, weight, bias, grad = in_dtype(dtype, case(2, 16, 32, 5, 6, taps))
    compiled = torch.compile(winograd_conv2d, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = results(compiled, x, weight, bias, grad)
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, torch.float32]
    assert_all_near(found, exact(x, weight, bias, grad))


def test_the_result_may_be_changed_in_place() -> None:
    x, weight, bias, grad = case(2, 16, 32, 5, 6)

    def in_place(*inputs: Tensor) -> Tensor:
        return F.relu(winograd_conv2d(*inputs), inplace=True)

    expected = results(lambda *inputs: plain(*inputs).relu(), *(t.double() for t in (x, weight, bias, grad)))
    assert_all_near(results(in_place, x, weight, bias, grad), expected)


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [(16, 32), (3, 5)], ids=str)
def test_operator(channels: tuple[int, int], dtype: torch.dtype, taps: int) -> None:
    x, weight, bias, _ = case(2, *channels, 5, 6, taps)
    inputs = tuple(each.requires_grad_() for each in (x.to(dtype), weight, bias))
    opcheck(_winograd, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5, 5)}, r"x must be \(N, in channels, H, W\), got \(3, 5, 5\)"),
        ({"x": torch.zeros(2, 3, 0, 5)}, r"x must be \(N, in channels, H, W\), got \(2, 3, 0, 5\)"),
        ({"x": torch.zeros(2, 3, 5, 5).half()}, "x must be float32 or bfloat16, got torch.float16"),
        (
            {"weight": torch.zeros(4, 3, 7, 7)},
            r"weight must be \(out channels, 3, 3, 3\) or \(out channels, 3, 5, 5\), got \(4, 3, 7, 7\)",
        ),
        (
            {"weight": torch.zeros(4, 3, 3, 5)},
            r"weight must be \(out channels, 3, 3, 3\) or \(out channels, 3, 5, 5\), got \(4, 3, 3, 5\)",
        ),
        (
            {"weight": torch.zeros(4, 2, 3, 3)},
            r"weight must be \(out channels, 3, 3, 3\) or \(out channels, 3, 5, 5\), got \(4, 2, 3, 3\)",
        ),
        ({"weight": torch.zeros(4, 3, 3, 3).bfloat16()}, "weight must be float32 on cpu, got torch.bfloat16"),
        ({"bias": torch.zeros(3)}, r"bias must be \(4,\), got \(3,\)"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=f"winograd_conv2d: {message}"):
        winograd_conv2d(**{**arguments, **change})


@pytest.mark.parametrize("grad", [torch.zeros(2, 4, 5, 4), torch.zeros(2, 4, 5, 5).bfloat16()], ids=str)
def test_a_gradient_that_does_not_fit_is_refused(grad: Tensor) -> None:
    x, weight = torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"gradient does not fit.* expected torch.float32 \(2, 4, 5, 5\)"):
        torch.ops.fastalex.winograd_conv2d_backward(grad, x, weight)


def test_the_number_of_channels_fills_the_vectors() -> None:
    assert CHANNELS % LANES == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "taps"), [(16, 5), (16, 3), (256, 3), (5, 3)])
def test_only_the_gradients_that_are_needed_are_computed(
    channels: int, taps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, grad = case(2, channels, 32, 5, 6, taps)
    x, grad = x.to(dtype), grad.to(dtype)
    both = results(winograd_conv2d, x, weight, bias, grad)[1:3]
    operator, asked = winograd._winograd_backward, []

    def spy(*arguments: Any) -> Any:
        asked.append([each.numel() > 0 for each in operator(*arguments)[:2]])
        return operator(*arguments)

    monkeypatch.setattr(winograd, "_winograd_backward", spy)
    for i in range(2):
        inputs = [x.detach(), weight.detach(), bias]
        inputs[i].requires_grad_()
        (found,) = torch.autograd.grad(winograd_conv2d(*inputs), inputs[i], grad)
        assert torch.equal(found, both[i])
    assert asked == [[True, False], [False, True]]


def test_second_derivatives_are_refused() -> None:
    x, weight, bias, _ = case(1, 16, 16, 4, 4)
    x.requires_grad_()
    (first,) = torch.autograd.grad(winograd_conv2d(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()
