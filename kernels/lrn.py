"""Local response normalisation as PyTorch operators: checks, dispatch by device, gradients.

Four operators in the namespace `fastalex`, two forward and two backward. The body of each is the plain
PyTorch reference, which serves float64 and every device without a kernel of its own; the CPU runs
`lrn_numba`, CUDA runs `lrn_triton`. Those modules are imported by the first call that needs them, so that
neither Numba nor Triton is loaded by importing this one.

The operators are opaque to torch.compile (`custom_op`, not `triton_op`: under the interpreter that the
tests use, the latter fails opcheck), have no autocast rule (a bf16 activation stays bf16: the arithmetic
inside is fp32 whatever the dtype) and keep nothing but the input, and for pooling one byte a result, for
the gradient. They are deterministic, and differentiable once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import lrn_reference as reference
from ._checks import check_fits

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Local response normalisation across channels: `torch.nn.functional.local_response_norm`, in one pass.

    y[c] = x[c] / (k + alpha / size * sum of x[j]^2)^beta, j from c - size // 2 to c + (size - 1) // 2.

    Args:
        x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), fp32, bf16, fp16 or float64; channels-last is fast.
        size: channels in the window, at least 1.
        alpha: factor of the mean square. PyTorch's meaning: the 1e-4 of Krizhevsky et al. (2012), who do
            not divide by `size` = 5, is 5e-4 here.
        beta: exponent; 0.75 is fast.
        k: added constant.

    Returns:
        A tensor with the shape, dtype and memory format of `x`.

    Raises:
        ValueError: wrong rank, dtype or window.
    """
    _check(x, size, (3, 4, 5), "local_response_norm")
    return _lrn(x, size, alpha, beta, k, False)


def relu_lrn(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """`local_response_norm(relu(x), ...)` in one pass; arguments, result and errors as there."""
    _check(x, size, (3, 4, 5), "relu_lrn")
    return _lrn(x, size, alpha, beta, k, True)


def relu_lrn_max_pool(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """`max_pool2d(relu_lrn(x, ...), kernel_size=3, stride=2)` in one pass forward and one backward.

    Args:
        x: (N, C, H, W) with H and W at least 3; the others as for `local_response_norm`.

    Returns:
        (N, C, (H - 3) // 2 + 1, (W - 3) // 2 + 1), dtype and memory format of `x`. The maximum is taken
        in fp32, before rounding; between exactly equal values the gradient goes to the first, as in
        `max_pool2d`.

    Raises:
        ValueError: wrong rank, dtype or window, or an image smaller than the pooling window.
    """
    _check_pooling(x, size, "relu_lrn_max_pool")
    return _lrn_max_pool(x, size, alpha, beta, k)[0]


def _check(x: Tensor, size: int, ranks: tuple[int, ...], name: str) -> None:
    if x.dim() not in ranks:
        expected = " or ".join(f"{rank}-D" for rank in ranks)
        raise ValueError(f"{name}: expected a {expected} tensor (N, C, ...), got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected a dtype among float32, bfloat16, float16, float64, got {x.dtype}")
    if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}: size must be a whole number of channels, at least 1, got {size!r}")


def _check_pooling(x: Tensor, size: int, name: str) -> None:
    _check(x, size, (4,), name)
    if x.shape[2] < 3 or x.shape[3] < 3:
        raise ValueError(f"{name}: height and width must be at least 3, got {tuple(x.shape)}")


def _check_pooled_gradient(grad: Tensor, argmax: Tensor, x: Tensor) -> None:
    shape = _pooled(x).shape
    check_fits("gradient", grad, shape, x.dtype, x)
    check_fits("argmax", argmax, shape, torch.uint8, x)


def _implementation(x: Tensor) -> ModuleType:
    """The module that computes `x`'s result: by device, and the reference for float64."""
    if x.dtype == torch.float64:
        return reference
    if x.device.type == "cuda":
        from . import lrn_triton

        return lrn_triton
    from . import lrn_numba

    return lrn_numba


def _pooled(x: Tensor) -> Tensor:
    """A view of `x` with the shape of the pooled result: its `empty_like` has the right strides too."""
    return x[:, :, : (x.shape[2] - 3) // 2 + 1, : (x.shape[3] - 3) // 2 + 1]


_ACCELERATED = ["cpu", "cuda"]


@custom_op("fastalex::lrn", mutates_args=())
def _lrn(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    return reference.lrn_forward(x, size, alpha, beta, k, relu)


@_lrn.register_kernel(_ACCELERATED)
def _(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    return _implementation(x).lrn_forward(x, size, alpha, beta, k, relu)


@_lrn.register_fake
def _(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    return torch.empty_like(x)


@custom_op("fastalex::lrn_backward", mutates_args=())
def _lrn_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    return reference.lrn_backward(grad, x, size, alpha, beta, k, relu)


@_lrn_backward.register_kernel(_ACCELERATED)
def _(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    check_fits("gradient", grad, x.shape, x.dtype, x)
    return _implementation(x).lrn_backward(grad, x, size, alpha, beta, k, relu)


@_lrn_backward.register_fake
def _(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    check_fits("gradient", grad, x.shape, x.dtype, x)
    return torch.empty_like(x)


@custom_op("fastalex::lrn_max_pool", mutates_args=())
def _lrn_max_pool(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    return reference.lrn_max_pool_forward(x, size, alpha, beta, k)


@_lrn_max_pool.register_kernel(_ACCELERATED)
def _(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    return _implementation(x).lrn_max_pool_forward(x, size, alpha, beta, k)


@_lrn_max_pool.register_fake
def _(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_pooled(x)), torch.empty_like(_pooled(x), dtype=torch.uint8)


@custom_op("fastalex::lrn_max_pool_backward", mutates_args=())
def _lrn_max_pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    return reference.lrn_max_pool_backward(grad, argmax, x, size, alpha, beta, k)


@_lrn_max_pool_backward.register_kernel(_ACCELERATED)
def _(grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    _check_pooled_gradient(grad, argmax, x)
    return _implementation(x).lrn_max_pool_backward(grad, argmax, x, size, alpha, beta, k)


@_lrn_max_pool_backward.register_fake
def _(grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    _check_pooled_gradient(grad, argmax, x)
    return torch.empty_like(x)


def _save_lrn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _differentiate_lrn(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _lrn_backward(grad, x, *ctx.options), None, None, None, None, None


def _save_lrn_max_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_lrn_max_pool(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, argmax = ctx.saved_tensors
    return _lrn_max_pool_backward(grad, argmax, x, *ctx.options), None, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "fastalex's LRN kernels are differentiable once; for second derivatives use "
        "torch.nn.functional.local_response_norm"
    )


_lrn.register_autograd(_differentiate_lrn, setup_context=_save_lrn)
_lrn_max_pool.register_autograd(_differentiate_lrn_max_pool, setup_context=_save_lrn_max_pool)
_lrn_backward.register_autograd(_refuse)
_lrn_max_pool_backward.register_autograd(_refuse)
