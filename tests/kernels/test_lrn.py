"""The LRN functions against PyTorch's own in float64, for every layout, dtype and window, and within PyTorch.

The same tests run on CUDA where there is a GPU; `test_lrn_triton.py` tests the Triton kernels without one.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastalex.kernels import local_response_norm, lrn, lrn_reference, relu_lrn, relu_lrn_max_pool
from tests.tolerances import assert_as_accurate, far_from_jumps, unit_roundoff, usual_sum_error

ALEXNET = (5, 5e-4, 0.75, 2.0)  # size, alpha in PyTorch's meaning, beta, k
STRONG = (5, 0.5, 0.75, 1.0)  # a window whose neighbours matter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
Options = tuple[int, float, float, float]


def torch_local_response_norm(x: Tensor, options: Options) -> Tensor:
    return F.local_response_norm(x, *options)


def torch_relu_lrn(x: Tensor, options: Options) -> Tensor:
    return F.local_response_norm(x.relu(), *options)


def torch_relu_lrn_max_pool(x: Tensor, options: Options) -> Tensor:
    return F.max_pool2d(F.local_response_norm(x.relu(), *options), 3, 2)


FUNCTIONS = [
    pytest.param(local_response_norm, torch_local_response_norm, id="local_response_norm"),
    pytest.param(relu_lrn, torch_relu_lrn, id="relu_lrn"),
    pytest.param(relu_lrn_max_pool, torch_relu_lrn_max_pool, id="relu_lrn_max_pool"),
]


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def has_rival(x: Tensor, options: Options, distance: float) -> Tensor:
    """Where a pooling window's two largest values are unequal but so close that rounding may swap them."""
    normalised = torch_relu_lrn(x, options)
    windows = normalised.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)
    first, second = windows.topk(2).values.unbind(-1)
    return (first != second) & (first - second < distance * first)


def check(
    ours: Callable[..., Tensor], theirs: Callable[[Tensor, Options], Tensor], x: Tensor, options: Options
) -> Tensor:
    """Check result and gradient against float64, dtype and strides against the input's; return the result."""
    x = x.detach().requires_grad_()
    exact_x = x.detach().double().contiguous().requires_grad_()
    result, exact = ours(x, *options), theirs(exact_x, options)
    grad = random(tuple(result.shape), x.dtype, str(x.device), seed=1)
    if ours is relu_lrn_max_pool:
        grad[has_rival(exact_x.detach(), options, 1e-5 if x.dtype == torch.float32 else 1e-3)] = 0
    (dx,) = torch.autograd.grad(result, x, grad)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, grad.double())
    assert result.dtype == dx.dtype == x.dtype
    # A 16-bit result is rounded once, by up to eps / 2. Before that come the errors of fp32 arithmetic and,
    # for bf16, of a power that is only as exact as bf16 needs. In the gradient two terms may cancel, so its
    # error is relative to the larger one.
    arithmetic = 1.6e-4 if x.dtype == torch.bfloat16 else 4e-6
    relative = arithmetic + (0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2)
    scale = max(1.0, exact_dx.abs().max().item() if exact_dx.numel() else 1.0)
    torch.testing.assert_close(result.double(), exact, rtol=relative, atol=1e-6)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=relative, atol=arithmetic * scale)
    assert dx.stride() == torch.empty_like(x).stride()
    return result


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 96, 97, 256])
@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
def test_against_float64(
    ours: Callable[..., Tensor],
    theirs: Callable[[Tensor, Options], Tensor],
    channels: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: str,
) -> None:
    x = random((2, channels, 7, 6), dtype, device).contiguous(memory_format=layout)
    for options in (ALEXNET, STRONG):
        result = check(ours, theirs, x, options)
        assert result.is_contiguous(memory_format=layout)


# Even windows, a window of one, windows wider than the channels and wider than two blocks of channels.
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 12, 33, 34, 70])
@pytest.mark.parametrize("channels", [3, 32, 41])
@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
def test_any_window(
    ours: Callable[..., Tensor],
    theirs: Callable[[Tensor, Options], Tensor],
    channels: int,
    size: int,
    device: str,
) -> None:
    x = random((1, channels, 5, 4), torch.float32, device).contiguous(memory_format=torch.channels_last)
    check(ours, theirs, x, (size, 0.5, 0.75, 1.0))


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [0.5, 3.0])
def test_any_exponent(beta: float, k: float, device: str) -> None:
    check(relu_lrn, torch_relu_lrn, random((2, 32, 4, 4), torch.float32, device), (5, 0.3, beta, k))


@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
@pytest.mark.parametrize(
    "options", [(5, -10.0, 1.0, 1.0), (5, 1e-4, 1.0, -2.0), (5, -10.0, -1.0, 1.0)], ids=str
)
def test_negative_denominators(
    options: Options, ours: Callable[..., Tensor], theirs: Callable[[Tensor, Options], Tensor], device: str
) -> None:
    """Odd whole powers of a negative denominator are negative."""
    x = random((2, 16, 7, 7), torch.float32, device).abs() + 0.5
    assert (check(ours, theirs, x, options) < 0).any()


@pytest.mark.parametrize("channels", [16, 17])
def test_no_division_by_zero_beyond_the_last_channel(channels: int, device: str) -> None:
    """With k = 0 a window of zeros divides by zero; windows of channels that do not exist must not count."""
    x = random((2, channels, 3, 3), torch.float32, device)
    x[:, -1] = 0
    check(local_response_norm, torch_local_response_norm, x, (5, 0.5, 0.75, 0.0))


@pytest.mark.parametrize("shape", [(2, 32, 9), (2, 32, 3, 4), (2, 32, 2, 3, 4)], ids=["3d", "4d", "5d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(local_response_norm, torch_local_response_norm, random(shape, dtype, device), STRONG)


def test_channels_last_3d(device: str) -> None:
    x = random((2, 32, 2, 3, 4), torch.bfloat16, device).contiguous(memory_format=torch.channels_last_3d)
    result = check(local_response_norm, torch_local_response_norm, x, STRONG)
    assert result.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[:, :, 1:, 2:],
        lambda x: x[:, 3:35],
        lambda x: x[::2],
        lambda x: x[:, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
    ids=["pixels", "channels", "batch", "strided_channels", "transposed", "expanded"],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
def test_slices(
    ours: Callable[..., Tensor],
    theirs: Callable[[Tensor, Options], Tensor],
    layout: torch.memory_format,
    cut: Callable[[Tensor], Tensor],
    device: str,
) -> None:
    x = random((3, 36, 7, 8), torch.bfloat16, device).contiguous(memory_format=layout)
    check(ours, theirs, cut(x), STRONG)


def test_gradient_in_another_layout(device: str) -> None:
    x = random((2, 32, 5, 5), torch.float32, device).contiguous(memory_format=torch.channels_last)
    grad = random((2, 32, 2, 2), torch.float32, device, seed=1)
    grads = [
        torch.ops.fastalex.lrn_max_pool_backward(
            g, torch.ops.fastalex.lrn_max_pool(x, *STRONG)[1], x, *STRONG
        )
        for g in (grad, grad.contiguous(memory_format=torch.channels_last), grad.mT.contiguous().mT)
    ]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
def test_empty_batch(
    ours: Callable[..., Tensor],
    theirs: Callable[[Tensor, Options], Tensor],
    layout: torch.memory_format,
    dtype: torch.dtype,
    device: str,
) -> None:
    x = random((0, 16, 7, 7), dtype, device).contiguous(memory_format=layout).requires_grad_()
    result = ours(x, *ALEXNET)
    result.sum().backward()
    assert result.shape == theirs(torch.zeros(1, 16, 7, 7), ALEXNET)[:0].shape
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
def test_gradcheck(
    ours: Callable[..., Tensor],
    theirs: Callable[[Tensor, Options], Tensor],
    layout: torch.memory_format,
) -> None:
    x = random((2, 7, 5, 4), torch.float64).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x, 4, 0.5, 0.75, 1.0), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
@pytest.mark.parametrize("channels", [32, 33])  # whole blocks of channels, and others
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_infinity_propagate_as_in_torch(
    value: float,
    channels: int,
    ours: Callable[..., Tensor],
    theirs: Callable[[Tensor, Options], Tensor],
    dtype: torch.dtype,
    device: str,
) -> None:
    x = random((2, channels, 7, 7), dtype, device).contiguous(memory_format=torch.channels_last)
    x[0, [0, 10, 31], 2, 3] = value
    x[1, 15:18, 0, 0] = value
    x = x.requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    result, exact = ours(x, *STRONG), theirs(exact_x, STRONG)
    result.sum().backward()
    exact.sum().backward()
    assert x.grad is not None
    assert exact_x.grad is not None
    relative = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(result.float(), exact, rtol=relative, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(x.grad.float(), exact_x.grad, rtol=relative, atol=1e-5, equal_nan=True)


def test_fp16_squares_that_overflow(device: str) -> None:
    """Squares of values above 256 exceed fp16's largest number, 65504."""
    x = (random((2, 32, 4, 4), torch.float32, device) * 5000).half()
    result = check(local_response_norm, torch_local_response_norm, x, (5, 1e-4, 0.75, 1.0))
    assert result.abs().max() > 1  # squaring in fp16 would have given 0 throughout


def test_bf16_rounds_to_nearest_even() -> None:
    """With alpha 0, y = x / k^beta exactly: 1 and 1.5 times an odd and an even mantissa, halfway cases."""
    x = torch.tensor([1 + i * 2.0**-7 for i in range(128)]).view(1, 16, 8, 1).bfloat16()
    result = local_response_norm(x, 1, 0.0, 1.0, 1 / 1.5)
    assert torch.equal(result, (x.float() / torch.tensor(1 / 1.5)).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_have_the_argmax_of_max_pool(dtype: torch.dtype, device: str) -> None:
    """Equal pixels, zeros among them, have equal results; the argmax must be torch's everywhere."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(-1, 2, (4, 32), generator=generator).to(dtype)  # four kinds of pixel
    kinds = torch.randint(0, 4, (2, 11, 9), generator=generator)
    x = pixels[kinds].permute(0, 3, 1, 2).to(device).contiguous(memory_format=torch.channels_last)
    _, argmax = torch.ops.fastalex.lrn_max_pool(x, *STRONG)
    _, index = F.max_pool2d(F.local_response_norm(x.double().relu(), *STRONG), 3, 2, return_indices=True)
    row = torch.arange(5, device=device)[:, None] * 2 + argmax // 3
    column = torch.arange(4, device=device) * 2 + argmax % 3
    assert torch.equal(row * 9 + column, index)
    assert (argmax != 0).any()  # not only ties
    check(relu_lrn_max_pool, torch_relu_lrn_max_pool, x, STRONG)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 3, 3), (2, 17, 4, 3), (1, 16, 8, 9), (3, 16, 9, 8)])
def test_pooling_at_the_borders(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Rows and columns that no window reaches have zero gradient, as in max_pool2d."""
    x = random(shape, dtype, device).contiguous(memory_format=torch.channels_last)
    check(relu_lrn_max_pool, torch_relu_lrn_max_pool, x, STRONG)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 4])
def test_agrees_with_the_reference(size: int, dtype: torch.dtype, device: str) -> None:
    x = random((2, 48, 9, 8), dtype, device).contiguous(memory_format=torch.channels_last)
    options = (size, 0.5, 0.75, 1.0)
    pooled, argmax = torch.ops.fastalex.lrn_max_pool(x, *options)
    expected, expected_argmax = lrn_reference.lrn_max_pool_forward(x, *options)
    grad = random(tuple(pooled.shape), dtype, device, seed=1)
    dx = torch.ops.fastalex.lrn_max_pool_backward(grad, argmax, x, *options)
    expected_dx = lrn_reference.lrn_max_pool_backward(grad, argmax, x, *options)
    relative = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(pooled, expected, rtol=relative, atol=1e-6)
    torch.testing.assert_close(dx, expected_dx, rtol=relative, atol=1e-5)
    assert (argmax == expected_argmax).float().mean() > 0.999  # fp32 rounding may swap nearly equal values


# --- with a bias ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", ["float32", "that of x"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 96])
def test_bias_against_float64(
    channels: int, dtype: torch.dtype, layout: torch.memory_format, bias_dtype: str, device: str
) -> None:
    """As `check`, with the bias's gradient: the sum of dx before it is rounded."""
    x = random((2, channels, 8, 9), dtype, device).contiguous(memory_format=layout)[:, :, 1:].requires_grad_()
    bias = random((channels,), torch.float32 if bias_dtype == "float32" else dtype, device, seed=2)
    bias.requires_grad_()
    exact_x, exact_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    biased = exact_x + exact_bias[:, None, None]
    result, exact = relu_lrn_max_pool(x, *STRONG, bias), torch_relu_lrn_max_pool(biased, STRONG)
    grad = random(tuple(result.shape), dtype, device, seed=1)
    grad[has_rival(biased.detach(), STRONG, 1e-5)] = 0
    dx, d_bias = torch.autograd.grad(result, (x, bias), grad)
    exact_dx, exact_d_bias = torch.autograd.grad(exact, (exact_x, exact_bias), grad.double())
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    scale = max(1.0, exact_dx.abs().max().item())
    # The power on CUDA and, where the bias makes the Numba kernel's input fp32, on the CPU is fp32's.
    torch.testing.assert_close(result.double(), exact, rtol=4e-6 + rounding, atol=1e-6)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=4e-6 + rounding, atol=4e-6 * scale)
    assert result.dtype == dx.dtype == dtype
    assert dx.stride() == torch.empty_like(x).stride()
    assert d_bias.dtype == bias.dtype
    error = (d_bias.double() - exact_d_bias).abs()
    terms = exact_dx.transpose(0, 1).flatten(1).abs()
    bound = terms.shape[1] * 4e-6 * scale + 1e-5 * terms.sum(1)
    bound += torch.finfo(bias.dtype).eps / 2 * exact_d_bias.abs()
    assert (error <= bound).all()


def test_bias_of_a_reference_shape(device: str) -> None:
    """Negative alpha, where the Numba kernel hands over to the reference."""
    x, bias = random((2, 16, 7, 7), torch.float32, device).abs() + 0.5, random((16,), torch.float32, device)
    options = (5, -10.0, 1.0, 1.0)
    expected = torch_relu_lrn_max_pool(x.double() + bias.double()[:, None, None], options)
    assert (expected < 0).any()
    found = relu_lrn_max_pool(x, *options, bias).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradcheck_with_bias() -> None:
    x = random((2, 5, 3, 4), torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    bias = random((5,), torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: relu_lrn_max_pool(x, 4, 0.5, 0.75, 1.0, bias), (x, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_empty_batch_with_bias(dtype: torch.dtype, device: str) -> None:
    x = random((0, 16, 7, 7), dtype, device).requires_grad_()
    bias = torch.ones(16, dtype=dtype, device=device, requires_grad=True)
    relu_lrn_max_pool(x, *ALEXNET, bias).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_only_the_gradients_that_are_asked_for(device: str) -> None:
    for x_needs, bias_needs in ((True, False), (False, True)):
        x = random((1, 16, 5, 5), torch.float32, device).requires_grad_(x_needs)
        bias = torch.ones(16, device=device).requires_grad_(bias_needs)
        relu_lrn_max_pool(x, *ALEXNET, bias).sum().backward()
        assert (x.grad is not None, bias.grad is not None) == (x_needs, bias_needs)


# --- within PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
    x = random((2, 16, 7, 8), dtype, device).contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(lrn._lrn, (x, *ALEXNET, True))
    torch.library.opcheck(lrn._lrn_max_pool, (x, *ALEXNET))
    x = x.detach()
    pooled, argmax = lrn._lrn_max_pool(x, *ALEXNET)
    torch.library.opcheck(lrn._lrn_backward, (x, x, *ALEXNET, True))
    torch.library.opcheck(lrn._lrn_max_pool_backward, (pooled, argmax, x, *ALEXNET))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_with_bias(dtype: torch.dtype, device: str) -> None:
    x = random((2, 16, 7, 8), dtype, device).contiguous(memory_format=torch.channels_last).requires_grad_()
    bias = torch.ones(16, dtype=torch.float32, device=device, requires_grad=True)
    torch.library.opcheck(lrn._lrn_max_pool, (x, *ALEXNET, bias))
    x, bias = x.detach(), bias.detach()
    pooled, argmax = lrn._lrn_max_pool(x, *ALEXNET, bias)
    torch.library.opcheck(lrn._lrn_max_pool_bias_backward, (pooled, argmax, x, bias, *ALEXNET))


class Block(nn.Module):
    """Two convolutions, each with one of the kernels: AlexNet's first block and part of the second.

    The first leaves its bias to the kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.first.weight)
        x = relu_lrn_max_pool(x, *STRONG, self.first.bias)
        return relu_lrn(self.second(x), *STRONG)

    def plain(self, x: Tensor) -> Tensor:
        x = torch_relu_lrn_max_pool(self.first(x), STRONG)
        return torch_relu_lrn(self.second(x), STRONG)


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def exact_gradients(block: Block, images: Tensor) -> dict[str, Tensor]:
    block = copy.deepcopy(block).double()
    return gradients(block, block.plain(images.double()))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().to(memory_format=torch.channels_last)


@pytest.fixture
def images(block: Block) -> Tensor:
    images = far_from_jumps(copy.deepcopy(block).double().plain, 4, 3, 15, 13)
    return images.contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(block: Block, images: Tensor, dynamic: bool) -> None:
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    ours, plain = gradients(block, compiled(images)), gradients(block, block.plain(images))
    # The longest sums are those of the first weight's gradient, over the pixels of all images.
    floor = usual_sum_error(torch.float32, 4 * 13 * 11)
    assert_as_accurate(ours, [plain], exact_gradients(block, images), floor=floor)


def test_autocast_keeps_bf16(block: Block, images: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        activation = block.first(images)
        pooled = relu_lrn_max_pool(activation, *STRONG)
        assert activation.dtype == pooled.dtype == relu_lrn(pooled, 5).dtype == torch.bfloat16
        assert relu_lrn(images, 5).dtype == torch.float32
        ours, plain = gradients(block, block(images)), gradients(block, block.plain(images))
    exact = exact_gradients(block, images)
    assert_as_accurate(ours, [plain], exact, floor=unit_roundoff(torch.bfloat16))


def test_no_grad_and_checkpointing(block: Block, images: Tensor) -> None:
    expected = gradients(block, block(images))
    with torch.no_grad():
        assert not block(images).requires_grad
    recomputed = gradients(block, checkpoint(block, images, use_reentrant=False))
    assert all(torch.equal(recomputed[name], theirs) for name, theirs in expected.items())


def test_distributed_data_parallel(block: Block, images: Tensor, tmp_path: Path) -> None:
    expected = gradients(block, block(images))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(block)
        found = gradients(wrapped, wrapped(images))
        assert all(torch.equal(found[f"module.{name}"], theirs) for name, theirs in expected.items())
    finally:
        torch.distributed.destroy_process_group()


def test_deterministic_for_any_number_of_threads(block: Block, images: Tensor) -> None:
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        x = random((3, 96, 13, 11), torch.bfloat16).contiguous(memory_format=torch.channels_last)
        results = []
        for count in (1, 2, 2, max(threads, 3)):
            torch.set_num_threads(count)
            y = x.clone().requires_grad_()
            pooled = relu_lrn_max_pool(relu_lrn(y, *ALEXNET), *ALEXNET)
            pooled.square().sum().backward()
            assert y.grad is not None
            results.append((pooled.detach(), y.grad))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for pooled, grad in results[1:]:
        assert torch.equal(pooled, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_second_derivative_is_refused() -> None:
    def biased(x: Tensor, size: int) -> Tensor:
        return relu_lrn_max_pool(x, size, bias=torch.ones(16))

    for function in (relu_lrn, relu_lrn_max_pool, biased):
        x = random((1, 16, 5, 5), torch.float32).requires_grad_()
        (dx,) = torch.autograd.grad(function(x, 5).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            dx.sum().backward()


def test_callers_in_several_threads() -> None:
    x = random((4, 96, 9, 9), torch.float32).contiguous(memory_format=torch.channels_last)
    expected = relu_lrn(x, *ALEXNET)
    results: list[Tensor] = []

    def call() -> None:
        for _ in range(20):
            results.append(relu_lrn(x, *ALEXNET))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)


def run_python(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_after_fork_and_on_every_threading_layer(layer: str) -> None:
    """A forked worker with one thread, such as a DataLoader's, must not use a thread pool."""
    program = """
        import os, threading, torch
        from fastalex.kernels import relu_lrn
        x = torch.randn(4, 32, 5, 5).contiguous(memory_format=torch.channels_last)
        expected = relu_lrn(x, 5)
        callers = [threading.Thread(target=lambda: [relu_lrn(x, 5) for _ in range(50)]) for _ in range(3)]
        [caller.start() for caller in callers]
        [caller.join() for caller in callers]
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(relu_lrn(x, 5), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("same")
    """
    assert run_python(program, NUMBA_THREADING_LAYER=layer).strip() == "same"


@pytest.mark.slow
def test_works_where_no_cache_can_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file is no folder")
    program = """
        import torch
        from unittest import mock
        import numba.core.caching as caching
        read_only = OSError("read-only")
        with mock.patch.object(caching._CacheLocator, "ensure_cache_path", side_effect=read_only):
            from fastalex.kernels import relu_lrn
            print(relu_lrn(torch.ones(1, 16, 1, 1), 1, 0.0, 1.0, 2.0).unique().item())
    """
    assert run_python(program, NUMBA_CACHE_DIR=str(blocked)).strip() == "0.5"


def test_importing_loads_no_compiler() -> None:
    program = """
        import sys
        import fastalex.kernels
        print("numba" in sys.modules, "triton" in sys.modules)
    """
    assert run_python(program).split() == ["False", "False"]


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relu_lrn(torch.ones(4, 4), 5), r"3-D or 4-D or 5-D tensor.*got shape \(4, 4\)"),
        (lambda: local_response_norm(torch.ones(1, 1, 1, 1, 1, 1), 5), "local_response_norm: expected"),
        (lambda: relu_lrn_max_pool(torch.ones(2, 4, 4), 5), r"expected a 4-D tensor.*got shape \(2, 4, 4\)"),
        (lambda: relu_lrn(torch.ones(1, 4, 4, dtype=torch.int32), 5), "got torch.int32"),
        (lambda: relu_lrn(torch.ones(1, 4, 4, dtype=torch.complex64), 5), "got torch.complex64"),
        (lambda: relu_lrn(torch.ones(1, 4, 4), 0), "size must be .* at least 1, got 0"),
        (lambda: relu_lrn(torch.ones(1, 4, 4), 2.5), r"size must be .* got 2\.5"),
        (lambda: relu_lrn_max_pool(torch.ones(1, 4, 2, 5), 5), r"at least 3, got \(1, 4, 2, 5\)"),
        (
            lambda: relu_lrn_max_pool(torch.ones(1, 4, 3, 3), 5, bias=torch.ones(3)),
            r"bias does not fit.*\(3,\).*expected torch.float32 \(4,\) on cpu",
        ),
        (
            lambda: relu_lrn_max_pool(torch.ones(1, 4, 3, 3).bfloat16(), 5, bias=torch.ones(4).half()),
            r"bias does not fit.* got torch.float16 .*expected torch.bfloat16 \(4,\)",
        ),
        (
            lambda: torch.ops.fastalex.lrn_backward(torch.ones(1, 4, 5), torch.ones(1, 4, 4), *ALEXNET, True),
            r"gradient does not fit.*\(1, 4, 5\).*expected torch.float32 \(1, 4, 4\)",
        ),
        (
            lambda: torch.ops.fastalex.lrn_backward(
                torch.ones(1, 4, 4, device="meta"), torch.ones(1, 4, 4), *ALEXNET, True
            ),
            "on meta, expected torch.float32 .* on cpu",
        ),
        (
            lambda: torch.ops.fastalex.lrn_max_pool_backward(
                torch.ones(1, 32, 2, 2), torch.ones(1, 32, 1, 1).byte(), torch.ones(1, 32, 5, 5), *ALEXNET
            ),
            r"argmax does not fit.*\(1, 32, 1, 1\).*expected torch.uint8 \(1, 32, 2, 2\)",
        ),
        (
            lambda: torch.ops.fastalex.lrn_max_pool_backward(
                torch.ones(1, 32, 2, 2), torch.ones(1, 32, 2, 2).long(), torch.ones(1, 32, 5, 5), *ALEXNET
            ),
            "argmax does not fit.* got torch.int64",
        ),
    ],
)
def test_errors(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
