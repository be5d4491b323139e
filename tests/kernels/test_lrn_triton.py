"""LRN as CUDA computes it, run in Triton's interpreter, against float64 `torch.nn.functional`.

Shapes that the Triton kernels do not take run the reference, as they do on CUDA (`on_cuda`). The functions
`check_*` run in the interpreter's process (see conftest); the tests say what to check.
"""

from __future__ import annotations

import builtins
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place for the one rounding at the end, doubled; fp32 sums in another order.
RTOL = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
CHANNELS_LAST, CONTIGUOUS, SLICED = "channels_last", "contiguous", "sliced"


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, scale: float = 5.0) -> Tensor:
    """Seeded random values in the given layout."""
    generator = torch.Generator().manual_seed(sum(shape))
    if layout == SLICED:  # every other row of a larger tensor, from the second on
        whole = make((shape[0], shape[1], 2 * shape[2], *shape[3:]), dtype, CONTIGUOUS, scale)
        return whole[:, :, 1::2]
    values = (torch.randn(shape, generator=generator) * scale).to(dtype)
    if layout == CHANNELS_LAST:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    return values


def on_cuda(x: Tensor, size: int) -> ModuleType:
    """The module that computes the result for a tensor like `x` on CUDA."""
    from fastalex.kernels import lrn

    with FakeTensorMode():  # needs no GPU
        return lrn._implementation(torch.empty(x.shape, dtype=x.dtype, device="cuda"), size)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert an error of the dtype's rounding, relative to the value, or of fp32's where terms cancel."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=RTOL[dtype], atol=3e-6 * largest, equal_nan=True
    )


def check_lrn(
    shape: tuple[int, ...],
    size: int,
    dtype: torch.dtype,
    layout: str,
    relu: bool,
    alpha: float = 1e-2,
    beta: float = 0.75,
    k: float = 2.0,
    scale: float = 5.0,
    device: str = "cpu",
) -> None:
    """Forward and backward against float64, and the layout of both results."""
    x = make(shape, dtype, layout, scale).to(device)
    module = on_cuda(x, size)
    y = module.lrn_forward(x, size, alpha, beta, k, relu)
    grad = torch.randn_like(y)
    dx = module.lrn_backward(grad, x, size, alpha, beta, k, relu)
    exact = x.double().requires_grad_()
    expected = F.local_response_norm(F.relu(exact) if relu else exact, size, alpha, beta, k)
    (expected_dx,) = torch.autograd.grad(expected, exact, grad.double())
    assert_close(y, expected.detach(), dtype)
    assert_close(dx, expected_dx, dtype)
    assert y.dtype == dx.dtype == dtype
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()


def windows(values: Tensor) -> Tensor:
    """The nine values of every 3x3 stride-2 window: (N, C, H, W) to (N, C, PH, PW, 9)."""
    return values.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)


def check_pool(
    shape: tuple[int, ...],
    size: int,
    dtype: torch.dtype,
    layout: str,
    beta: float = 0.75,
    k: float = 2.0,
    device: str = "cpu",
) -> None:
    """Maximum, argmax, gradient and layouts against float64."""
    arguments = (size, 1e-2, beta, k)
    x = make(shape, dtype, layout).to(device)
    module = on_cuda(x, size)
    y, argmax = module.lrn_max_pool_forward(x, *arguments)
    grad = torch.randn_like(y)
    dx = module.lrn_max_pool_backward(grad, argmax, x, *arguments)
    exact = x.double().requires_grad_()
    normalised = F.local_response_norm(F.relu(exact), *arguments)
    assert_close(y, F.max_pool2d(normalised, 3, 2).detach(), dtype)
    assert argmax.dtype == torch.uint8
    # The argmax points to the maximum, to fp32's rounding; `check_ties` checks exact ties.
    won = windows(normalised).gather(-1, argmax.long()[..., None])[..., 0]
    torch.testing.assert_close(won, F.max_pool2d(normalised, 3, 2), rtol=1e-6, atol=0)
    (expected_dx,) = torch.autograd.grad(won, exact, grad.double())
    assert_close(dx, expected_dx, dtype)
    # The layouts that the operators' fakes declare.
    assert y.stride() == argmax.stride() == torch.empty_like(x[:, :, : y.shape[2], : y.shape[3]]).stride()
    assert dx.stride() == torch.empty_like(x).stride()


def check_bias(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bias_dtype: torch.dtype,
    layout: str = CHANNELS_LAST,
    size: int = 5,
    beta: float = 0.75,
    k: float = 2.0,
    shift: float = 0.0,
    device: str = "cpu",
) -> None:
    """Maximum, argmax and both gradients with a bias around `shift`, against float64; equal in two runs."""
    arguments = (size, 1e-2, beta, k)
    x = make(shape, dtype, layout).to(device)
    bias = (make((shape[1], 1), bias_dtype, CONTIGUOUS) + shift)[:, 0].to(device)
    module = on_cuda(x, size)
    y, argmax = module.lrn_max_pool_forward(x, *arguments, bias)
    grad = torch.randn_like(y)
    dx, d_bias = module.lrn_max_pool_bias_backward(grad, argmax, x, bias, *arguments)
    exact, exact_bias = x.double().requires_grad_(), bias.double().requires_grad_()
    normalised = F.local_response_norm(F.relu(exact + exact_bias[:, None, None]), *arguments)
    pooled = F.max_pool2d(normalised, 3, 2)
    assert_close(y, pooled.detach(), dtype)
    won = windows(normalised).gather(-1, argmax.long()[..., None])[..., 0]
    torch.testing.assert_close(won, pooled, rtol=1e-6, atol=0)
    expected_dx, expected = torch.autograd.grad(won, (exact, exact_bias), grad.double())
    assert_close(dx, expected_dx, dtype)
    assert dx.stride() == torch.empty_like(x).stride()
    # The sum is of unrounded values, each with fp32's error (`assert_close`); its own error is another
    # half unit in the last place for each of the few additions that a value goes through.
    assert d_bias.dtype == bias_dtype
    terms = expected_dx.transpose(0, 1).flatten(1).abs()
    bound = terms.shape[1] * 3e-6 * terms.max() + 1e-5 * terms.sum(1)
    if bias_dtype != torch.float32:
        bound = bound + torch.finfo(bias_dtype).eps / 2 * expected.abs()
    assert ((d_bias.double() - expected).abs() <= bound).all()
    again = module.lrn_max_pool_bias_backward(grad, argmax, x, bias, *arguments)
    assert torch.equal(again[0], dx)
    assert torch.equal(again[1], d_bias)


def check_bias_special_values(channels: int) -> None:
    """A NaN or an infinity in `x` or the bias reaches what it reaches in PyTorch."""
    for where in ("x", "bias"):
        for value in (float("nan"), float("inf"), -float("inf")):
            x = make((1, channels, 5, 6), torch.float32, CHANNELS_LAST)
            bias = torch.linspace(-1, 1, channels)
            if where == "x":
                x[0, channels // 2, 1, 1] = value
            else:
                bias[channels // 2] = value
            module = on_cuda(x, 5)
            y, argmax = module.lrn_max_pool_forward(x, 5, 1e-2, 0.75, 2.0, bias)
            grad = torch.ones_like(y)
            found = module.lrn_max_pool_bias_backward(grad, argmax, x, bias, 5, 1e-2, 0.75, 2.0)
            inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
            activation = F.relu(inputs[0] + inputs[1][:, None, None])
            expected = F.max_pool2d(F.local_response_norm(activation, 5, 1e-2, 0.75, 2.0), 3, 2)
            torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
            for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def check_ties(channels: int) -> None:
    """Equal values: small integers, the same in all channels of a position, tie often and exactly."""
    x = torch.randint(-1, 3, (1, 1, 9, 9), generator=torch.Generator().manual_seed(0)).float()
    x = x.expand(1, channels, 9, 9).contiguous(memory_format=torch.channels_last)
    _, argmax = on_cuda(x, 5).lrn_max_pool_forward(x, 5, 1e-2, 0.75, 2.0)
    y = F.local_response_norm(F.relu(x), 5, 1e-2, 0.75, 2.0)
    _, index = F.max_pool2d(y, 3, 2, return_indices=True)
    row = index // 9 - 2 * torch.arange(4)[:, None]
    column = index % 9 - 2 * torch.arange(4)
    assert (windows(y) == y.amax()).sum(-1).max() > 1, "the test needs ties"
    torch.testing.assert_close(argmax.long(), 3 * row + column)


def check_special_values(channels: int, relu: bool) -> None:
    """NaN, infinity and squares that overflow fp32 give the results of PyTorch in fp32."""
    x = make((1, channels, 3, 5), torch.float32, CHANNELS_LAST)
    for column, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e30)):
        x[0, channels // 2, 1, column] = value
    grad = torch.ones_like(x)
    reference = x.clone().requires_grad_()
    expected = F.local_response_norm(F.relu(reference) if relu else reference, 5, 1e-2, 0.75, 2.0)
    (expected_dx,) = torch.autograd.grad(expected, reference, grad)
    module = on_cuda(x, 5)
    y = module.lrn_forward(x, 5, 1e-2, 0.75, 2.0, relu)
    dx = module.lrn_backward(grad, x, 5, 1e-2, 0.75, 2.0, relu)
    assert expected.isnan().any()
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-5, equal_nan=True)


def check_nan_wins(channels: int) -> None:
    """A NaN is the maximum of every window it is in, as in max_pool2d."""
    x = make((1, channels, 5, 5), torch.float32, CHANNELS_LAST)
    x[0, :, 2, 2] = float("nan")
    x[0, :, 0, 1] = float("nan")
    y, argmax = on_cuda(x, 5).lrn_max_pool_forward(x, 5, 1e-2, 0.75, 2.0)
    expected, index = F.max_pool2d(
        F.local_response_norm(F.relu(x), 5, 1e-2, 0.75, 2.0), 3, 2, return_indices=True
    )
    row = index // 5 - 2 * torch.arange(2)[:, None]
    column = index % 5 - 2 * torch.arange(2)
    assert expected.isnan().all()
    assert y.isnan().all()
    torch.testing.assert_close(argmax.long(), 3 * row + column)


def check_no_constant(channels: int) -> None:
    """With k = 0, d is 0 for channels that do not exist, which must not affect the others."""
    check_lrn((1, channels, 2, 3), 5, torch.float32, CHANNELS_LAST, False, 1e-2, 0.75, 0.0)


def check_negative_denominators(channels: int, beta: float) -> None:
    """Odd whole powers of a negative denominator are negative; powers that are not whole are NaN."""
    check_lrn((1, channels, 3, 2), 5, torch.float32, CHANNELS_LAST, True, 1e-4, beta, k=-2.0)
    x = torch.ones(1, channels, 2, 2)
    module = on_cuda(x, 5)
    y = module.lrn_forward(x, 5, 1e-4, beta, -2.0, False)
    assert (y < 0).all() == (beta % 2 == 1)
    assert module.lrn_forward(x, 5, 1e-4, beta + 0.5, -2.0, False).isnan().all()


def check_tiling() -> None:
    """Blocks and strips of other sizes give the same result, to the bit."""
    from fastalex.kernels import lrn_triton

    for case in lrn_triton.inspect_cases():
        results = []
        for block, rows in ((128, 2), (32, 3), (64, 1)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lrn_triton, "_BLOCK", block)
                patch.setattr(lrn_triton, "_FORWARD_ROWS", rows)
                patch.setattr(lrn_triton, "_BACKWARD_ROWS", rows)
                torch.manual_seed(0)
                launch = small(case.name)
                launch.run()
            results.append({name: launch.tensors[name].clone() for name in case.writes})
        for other in results[1:]:
            for name, value in other.items():
                if name == "sums_pointer":  # a row per program, and so in another order
                    torch.testing.assert_close(value.sum(0), results[0][name].sum(0))
                else:
                    assert torch.equal(value, results[0][name]), case.name


def small(name: str) -> Any:
    """The launch of an inspected kernel for one image of 7x7x16."""
    from fastalex.kernels import lrn_triton

    x = torch.randn(1, 7, 7, 16)
    y = torch.zeros(1, 3, 3, 16)
    argmax = torch.arange(144).reshape(y.shape).remainder(9).to(torch.uint8)
    arguments = (5, 1e-2, 0.75, 2.0, torch.linspace(-1, 1, 16) if "bias" in name else None)
    if "pool" in name:
        if "forward" in name:
            return lrn_triton._pool_forward(x, y, argmax, *arguments)
        return lrn_triton._pool_backward(torch.randn_like(y), argmax, x, torch.zeros_like(x), *arguments)[0]
    arguments = arguments[:-1]
    if name == "relu_lrn forward":
        return lrn_triton._forward(x, torch.zeros_like(x), *arguments, True)
    return lrn_triton._backward(torch.randn_like(x), x, torch.zeros_like(x), *arguments, True)[0]


def check_offsets_beyond_32_bits() -> None:
    """With more than 2^31 elements the last program, the only one run, accesses the right ones.

    The tensors are allocated but only their ends are touched, so they take no memory.
    """
    from triton.runtime import interpreter

    from fastalex.kernels import lrn_triton

    def last_program(*bounds: int) -> range:
        return builtins.range(bounds[0] - 1, bounds[0]) if bounds[-1] > 10_000 else builtins.range(*bounds)

    interpreter.range = last_program
    write_back = interpreter.GridExecutor._restore_args_dev
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # it would copy all of the tensors
    channels = 8
    try:
        batch = 2**31 // (9 * channels) + 3
        x = torch.empty(batch, 3, 3, channels, dtype=torch.bfloat16)
        dx = torch.empty_like(x)
        y = torch.empty(batch, 1, 1, channels, dtype=torch.bfloat16)
        argmax = torch.empty(batch, 1, 1, channels, dtype=torch.uint8)
        assert x.numel() > 2**31
        last = slice(batch - 2, batch)
        x[last] = make((2, 3, 3, channels), torch.bfloat16, CONTIGUOUS)
        arguments = (5, 1e-2, 0.75, 2.0)
        exact = x[last].movedim(-1, 1).double().requires_grad_()
        normalised = F.local_response_norm(F.relu(exact), *arguments)

        lrn_triton._forward(x, dx, *arguments, True).run()
        assert_close(dx[last].movedim(-1, 1), normalised.detach(), torch.bfloat16)
        lrn_triton._pool_forward(x, y, argmax, *arguments).run()
        pooled = F.max_pool2d(normalised, 3, 2)
        assert_close(y[last].movedim(-1, 1), pooled.detach(), torch.bfloat16)
        y[last] = 1.0
        lrn_triton._pool_backward(y, argmax, x, dx, *arguments)[0].run()
        (expected,) = torch.autograd.grad(pooled, exact, torch.ones_like(pooled))
        assert_close(dx[last].movedim(-1, 1), expected, torch.bfloat16)
    finally:
        del interpreter.range
        interpreter.GridExecutor._restore_args_dev = write_back


TAKEN = [
    ((1, 96, 5, 7), 5),
    ((2, 8, 3, 5), 5),
    ((1, 16, 4, 3), 2),
    ((1, 24, 3, 3), 3),
    ((1, 16, 3, 4), 4),
]
OTHERS = [
    ((1, 1, 3, 5), 1),
    ((2, 3, 5, 7), 5),
    ((1, 97, 5, 4), 5),
    ((1, 3, 4, 4), 9),  # wider than the channels
    ((1, 16, 5, 3), 8),  # even
    ((1, 8, 3, 3), 1),
]


def test_the_reference_serves_what_the_kernels_do_not_take() -> None:
    from fastalex.kernels import lrn_reference, lrn_triton

    empty = [((0, 8, 5, 5), 5), ((0, 3, 5, 5), 5)]
    large = [((1, 8, 2**14, 2**14), 5)]  # 2^31 elements in an image; its tensor is on the meta device
    for shapes, expected in ((TAKEN, lrn_triton), (OTHERS + empty + large, lrn_reference)):
        for shape, size in shapes:
            assert on_cuda(torch.empty(shape, device="meta"), size) is expected, (shape, size)
    assert on_cuda(torch.empty(1, 8, 3, 3, dtype=torch.float64), 5) is lrn_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), TAKEN + OTHERS, ids=str)
def test_lrn(interpreted: Any, shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    interpreted(check_lrn, shape, size, dtype, CHANNELS_LAST, dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), [*TAKEN[:2], *OTHERS], ids=str)
def test_pool(interpreted: Any, shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    interpreted(check_pool, shape, size, dtype, CHANNELS_LAST)


# Several programs of which the last is part empty; more and fewer channels than a program has lanes.
BIASED = [(3, 256, 3, 4), (1, 8, 9, 6), (1, 1040, 3, 3), (2, 7, 5, 4)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(((2, 96, 5, 7), dtype) for dtype in DTYPES), *((shape, torch.float32) for shape in BIASED)],
    ids=str,
)
def test_bias(interpreted: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(check_bias, shape, dtype, torch.float32)


@pytest.mark.parametrize("channels", [16, 7])
def test_bias_in_other_forms(interpreted: Any, channels: int) -> None:
    """In the dtype of x; with other layouts, windows and exponents; with k that needs what is masked."""
    shape = (2, channels, 5, 4)
    interpreted(check_bias, shape, torch.bfloat16, torch.bfloat16, SLICED)
    interpreted(check_bias, shape, torch.float16, torch.float32, CONTIGUOUS, 4)
    interpreted(check_bias, shape, torch.float32, torch.float32, CHANNELS_LAST, 3, 1.0, -2.0)
    interpreted(check_bias, shape, torch.float32, torch.float32, CHANNELS_LAST, 5, 0.75, 0.0, 30.0)


@pytest.mark.parametrize("channels", [16, 7])
def test_bias_and_special_values(interpreted: Any, channels: int) -> None:
    interpreted(check_bias_special_values, channels)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (4, 4), (5, 8), (8, 5)])
def test_pool_edges(interpreted: Any, height: int, width: int) -> None:
    """Heights and widths where the pooling windows leave no row over, or one."""
    interpreted(check_pool, (1, 8, height, width), 3, torch.float32, CHANNELS_LAST)


@pytest.mark.parametrize("layout", [CONTIGUOUS, SLICED])
@pytest.mark.parametrize("channels", [8, 5])
def test_layouts(interpreted: Any, channels: int, layout: str) -> None:
    interpreted(check_lrn, (2, channels, 3, 4), 5, torch.bfloat16, layout, True)
    interpreted(check_pool, (2, channels, 5, 5), 5, torch.bfloat16, layout)


@pytest.mark.parametrize("shape", [(2, 16, 5), (2, 7, 5), (1, 16, 2, 3, 2), (1, 7, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_ranks(interpreted: Any, shape: tuple[int, ...], layout: str) -> None:
    interpreted(check_lrn, shape, 5, torch.float32, layout, False)


@pytest.mark.parametrize("beta", [0.5, 1.0, 0.0])
@pytest.mark.parametrize("channels", [8, 5])
def test_other_beta(interpreted: Any, channels: int, beta: float) -> None:
    interpreted(check_lrn, (1, channels, 3, 3), 5, torch.float32, CHANNELS_LAST, False, 1e-2, beta)


@pytest.mark.parametrize("channels", [16, 5])
def test_squares_beyond_fp16(interpreted: Any, channels: int) -> None:
    """The squares of values in the thousands exceed fp16's range."""
    interpreted(
        check_lrn, (1, channels, 3, 3), 5, torch.float16, CHANNELS_LAST, False, 1e-4, 0.75, 1.0, 3000.0
    )


@pytest.mark.parametrize("channels", [16, 7])
def test_ties(interpreted: Any, channels: int) -> None:
    interpreted(check_ties, channels)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [16, 7])
def test_special_values(interpreted: Any, channels: int, relu: bool) -> None:
    interpreted(check_special_values, channels, relu)


@pytest.mark.parametrize("channels", [8, 7])
def test_nan_wins_the_maximum(interpreted: Any, channels: int) -> None:
    interpreted(check_nan_wins, channels)


@pytest.mark.parametrize("channels", [16, 7])
def test_no_constant(interpreted: Any, channels: int) -> None:
    interpreted(check_no_constant, channels)


def test_tiling_does_not_change_the_result(interpreted: Any) -> None:
    interpreted(check_tiling)


def test_offsets_beyond_32_bits(interpreted: Any) -> None:
    interpreted(check_offsets_beyond_32_bits)


def check_wrong_window(size: int) -> None:
    x = make((1, 16, 3, 3), torch.float32, CHANNELS_LAST)
    y = on_cuda(x, size).lrn_forward(x, size, 1e-2, 0.75, 2.0, False)
    assert_close(y, F.local_response_norm(x.double(), 5, 1e-2, 0.75, 2.0), torch.float32)


@pytest.mark.parametrize("beta", [-1.0, 1.0, 2.0])
@pytest.mark.parametrize("channels", [16, 17], ids=["triton", "reference"])
def test_negative_denominators(interpreted: Any, channels: int, beta: float) -> None:
    interpreted(check_negative_denominators, channels, beta)


def test_a_wrong_window_is_detected(interpreted: Any) -> None:
    """Negative control: a window of 4 fails the comparison with one of 5."""
    with pytest.raises(pytest.fail.Exception, match="not close"):
        interpreted(check_wrong_window, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS])
@pytest.mark.parametrize("shape", [(8, 96, 55, 55), (8, 256, 27, 27), (2, 97, 9, 10)], ids=str)
def test_on_a_gpu(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """The same checks with compiled kernels."""
    check_lrn(shape, 5, dtype, layout, True, device="cuda")
    check_pool(shape, 5, dtype, layout, device="cuda")
    check_bias(shape, dtype, torch.float32, layout, device="cuda")
