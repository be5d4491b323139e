"""Local response normalisation as PyTorch operators: checks, dispatch by device, gradients.

Five operators in the namespace `fastalex`, two forward and three backward. `lrn_numba` computes them on the
CPU and `lrn_triton` on CUDA. `lrn_reference`, plain PyTorch, computes float64, every other device, and the
shapes that the fast module does not take: on the CPU windows that reach over more than 16 channels to a
side, on CUDA channels not a multiple of 8 and windows of 1 or over 5. The fast modules are imported by the
first call that needs them, so importing this module loads neither Numba nor Triton.

The operators are opaque to torch.compile (`custom_op`, not `triton_op`: under the interpreter that the
tests use, the latter fails opcheck). They have no autocast rule: a bf16 activation stays bf16, and the
arithmetic inside is fp32 whatever the dtype. For the gradient they save the input alone, and for pooling one
byte per result. They are deterministic, and differentiable once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import lrn_reference as reference
from ._checks import check_fits, refuse_second_derivative

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Local response normalisation across channels: `torch.nn.functional.local_response_norm`, in one pass.

    y[c] = x[c] / (k + alpha / size * sum of x[j]^2)^beta, j from c - size // 2 to c + (size - 1) // 2.

    Args:
        x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), fp32, bf16, fp16 or float64. Other memory formats than
            channels-last are copied to it and back.
        size: channels in the window, at least 1.
        alpha: factor of the mean square. PyTorch's meaning: the 1e-4 of Krizhevsky et al. (2012), who do
            not divide by `size` = 5, is 5e-4 here.
        beta: exponent; the kernels are fastest for 0.75.
        k: added constant.

    Returns:
        A tensor with the shape, dtype and memory format of `x`.

    Raises:
        ValueError: `x` has another rank or dtype, or `size` is not a whole number of at least 1.
    """
    _check(x, size, (3, 4, 5), "local_response_norm")
    return _lrn(x, size, alpha, beta, k, False)


def relu_lrn(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """`local_response_norm(relu(x), size, alpha, beta, k)` in one pass.

    Args:
        x: (N, C, L), (N, C, H, W) or (N, C, D, H, W), fp32, bf16, fp16 or float64.
        size: channels in the window, at least 1.
        alpha, beta, k: factor of the mean square, exponent and added constant, as for `local_response_norm`.

    Returns:
        A tensor with the shape, dtype and memory format of `x`.

    Raises:
        ValueError: as `local_response_norm`.
    """
    _check(x, size, (3, 4, 5), "relu_lrn")
    return _lrn(x, size, alpha, beta, k, True)


def relu_lrn_max_pool(
    x: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`max_pool2d(relu_lrn(x + bias, ...), kernel_size=3, stride=2)` in one pass forward and one backward.

    With a bias, call the convolution before it without one: on CUDA that saves a pass over its output, and
    one over the gradient, whose sum over N, H and W is the bias's. Elsewhere the bias is added, and its
    gradient summed, in a pass of its own, which a convolution with a bias may do without.

    Args:
        x: (N, C, H, W) with H and W at least 3, fp32, bf16, fp16 or float64.
        size: channels in the window, at least 1.
        alpha, beta, k: factor of the mean square, exponent and added constant, as for `local_response_norm`.
        bias: (C,), fp32 or in the dtype of `x`, added to each channel before the ReLU. The sum is not rounded
            to the dtype of `x`.

    Returns:
        (N, C, (H - 3) // 2 + 1, (W - 3) // 2 + 1), in the dtype and memory format of `x`. The maximum is
        taken in fp32, before rounding; of exactly equal values the first receives the gradient, as in
        `max_pool2d`.

    Raises:
        ValueError: as `local_response_norm`; the image is smaller than the pooling window; or the bias has
            another shape, dtype or device than above.
    """
    _check_pooling(x, size, "relu_lrn_max_pool")
    if bias is not None:
        _check_bias(x, bias)
    return _lrn_max_pool(x, size, alpha, beta, k, bias)[0]


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


def _check_bias(x: Tensor, bias: Tensor) -> None:
    dtype = bias.dtype if bias.dtype == torch.float32 else x.dtype
    check_fits("bias", bias, x.shape[1:2], dtype, x)


def _check_pooled_gradient(grad: Tensor, argmax: Tensor, x: Tensor) -> None:
    shape = _pooled(x).shape
    check_fits("gradient", grad, shape, x.dtype, x)
    check_fits("argmax", argmax, shape, torch.uint8, x)


def _implementation(x: Tensor, size: int) -> ModuleType:
    """The module that computes the result for `x` and a window of `size`: see the module's docstring."""
    if x.dtype == torch.float64:
        return reference
    if x.device.type == "cuda":
        from . import lrn_triton as fast
    elif x.device.type == "cpu":
        from . import lrn_numba as fast  # type: ignore[no-redef]
    else:
        return reference
    return fast if fast.takes(x, size) else reference


def _pooled(x: Tensor) -> Tensor:
    """A view of `x` with the shape of the pooled result; `empty_like` gives it the right strides too."""
    return x[:, :, : (x.shape[2] - 3) // 2 + 1, : (x.shape[3] - 3) // 2 + 1]


# --- the operators: the options of a fake, and of a gradient, are size, alpha, beta, k and perhaps relu ---


@custom_op("fastalex::lrn", mutates_args=())
def _lrn(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    return _implementation(x, size).lrn_forward(x, size, alpha, beta, k, relu)


@_lrn.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x)


@custom_op("fastalex::lrn_backward", mutates_args=())
def _lrn_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    check_fits("gradient", grad, x.shape, x.dtype, x)
    return _implementation(x, size).lrn_backward(grad, x, size, alpha, beta, k, relu)


@_lrn_backward.register_fake
def _(grad: Tensor, x: Tensor, *options: Any) -> Tensor:
    check_fits("gradient", grad, x.shape, x.dtype, x)
    return torch.empty_like(x)


@custom_op("fastalex::lrn_max_pool", mutates_args=())
def _lrn_max_pool(
    x: Tensor, size: int, alpha: float, beta: float, k: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _implementation(x, size).lrn_max_pool_forward(x, size, alpha, beta, k, bias)


@_lrn_max_pool.register_fake
def _(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_pooled(x)), torch.empty_like(_pooled(x), dtype=torch.uint8)


@custom_op("fastalex::lrn_max_pool_backward", mutates_args=())
def _lrn_max_pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    _check_pooled_gradient(grad, argmax, x)
    return _implementation(x, size).lrn_max_pool_backward(grad, argmax, x, size, alpha, beta, k)


@_lrn_max_pool_backward.register_fake
def _(grad: Tensor, argmax: Tensor, x: Tensor, *options: Any) -> Tensor:
    _check_pooled_gradient(grad, argmax, x)
    return torch.empty_like(x)


@custom_op("fastalex::lrn_max_pool_bias_backward", mutates_args=())
def _lrn_max_pool_bias_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, bias: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor]:
    _check_pooled_gradient(grad, argmax, x)
    _check_bias(x, bias)
    module = _implementation(x, size)
    return module.lrn_max_pool_bias_backward(grad, argmax, x, bias, size, alpha, beta, k)


@_lrn_max_pool_bias_backward.register_fake
def _(grad: Tensor, argmax: Tensor, x: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _check_pooled_gradient(grad, argmax, x)
    return torch.empty_like(x), bias.new_empty(bias.shape)


# --- gradients --------------------------------------------------------------------------------------------


def _save_lrn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _differentiate_lrn(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _lrn_backward(grad, x, *ctx.options), *(None for _ in ctx.options)


def _save_lrn_max_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.options, bias = inputs
    ctx.save_for_backward(x, output[1], bias)
    ctx.mark_non_differentiable(output[1])


def _differentiate_lrn_max_pool(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, argmax, bias = ctx.saved_tensors
    no_options = (None for _ in ctx.options)
    if bias is None:
        return _lrn_max_pool_backward(grad, argmax, x, *ctx.options), *no_options, None
    dx, d_bias = _lrn_max_pool_bias_backward(grad, argmax, x, bias, *ctx.options)
    return dx, *no_options, d_bias


_lrn.register_autograd(_differentiate_lrn, setup_context=_save_lrn)
_lrn_max_pool.register_autograd(_differentiate_lrn_max_pool, setup_context=_save_lrn_max_pool)
for _backward in (_lrn_backward, _lrn_max_pool_backward, _lrn_max_pool_bias_backward):
    refuse_second_derivative(
        _backward,
        "fastalex's LRN kernels are differentiable once; for second derivatives use "
        "torch.nn.functional.local_response_norm",
    )
