"""Local response normalisation in Triton for any number of channels and any window: plain, and not tuned.

A lane is one element of a channels-last tensor; it loops over the channels of its window, and its
neighbours' loads put them in the cache. `lrn_triton` explains the words, has the formulas, and takes these
kernels where its own do not fit. Every offset is 64 bits wide.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton's values have no types that mypy knows)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_launch import SIZES, Launch, cdiv

_SIZES = [*SIZES, "H", "W", "C", "before", "after"]


@triton.jit
def power(d, neg_beta, B75: tl.constexpr):
    """d^-beta. Beta = 0.75 takes two fast instructions, and gives inf for 0 and 0 for inf as it must.

    Of a negative d (which takes a negative k or alpha) whole powers exist, and others are NaN, as in PyTorch.
    """
    if B75:
        r = tl.rsqrt(d)
        return r * tl.sqrt(r)
    else:
        magnitude = tl.where(neg_beta == 0.0, 1.0, tl.exp2(neg_beta * tl.log2(tl.abs(d))))
        is_whole = tl.floor(neg_beta) == neg_beta
        is_even = 2.0 * tl.floor(0.5 * neg_beta) == neg_beta
        sign = tl.where(is_even, 1.0, tl.where(is_whole, -1.0, float("nan")))
        return tl.where(d < 0.0, sign, 1.0) * magnitude


@triton.jit
def reciprocal(d, B75: tl.constexpr):
    if B75:
        r = tl.rsqrt(d)  # the one that `power` has computed already
        return r * r
    else:
        return 1.0 / d


@triton.jit
def _load_relu(x_pointer, offset, mask, RELU: tl.constexpr):
    x = tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU: tl.constexpr):
    total = tl.zeros_like(channel).to(tl.float32)
    for shift in range(-before, after + 1):
        inside = mask & (channel + shift >= 0) & (channel + shift < C)
        x = _load_relu(x_pointer, offset + shift, inside, RELU)
        total += x * x
    return k + alpha * total


@triton.jit
def _load_gradient(
    grad_pointer, argmax_pointer, offset, channel, mask, C, H, W, POOLED: tl.constexpr
):  # fmt: skip
    """G of an element; with pooling, the sum over the windows that it won."""
    if POOLED:
        position = offset // C
        column = position % W
        row = position // W % H
        image = position // W // H
        pooled_h = (H - 3) // 2 + 1
        pooled_w = (W - 3) // 2 + 1
        grad = tl.zeros_like(channel).to(tl.float32)
        for up in range(2):
            for back in range(2):
                y = row // 2 - up
                x = column // 2 - back
                tap = (row - 2 * y) * 3 + column - 2 * x
                inside = mask & (y >= 0) & (y < pooled_h) & (x >= 0) & (x < pooled_w)
                inside = inside & (row - 2 * y < 3) & (column - 2 * x < 3)
                source = ((image * pooled_h + y) * pooled_w + x) * C + channel
                won = tl.load(argmax_pointer + source, mask=inside, other=9) == tap
                grad += tl.load(grad_pointer + source, mask=inside & won, other=0.0).to(tl.float32)
        return grad
    else:
        return tl.load(grad_pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _plain_forward_kernel(
    x_pointer,
    y_pointer,
    elements,
    C,
    before,
    after,
    alpha,
    k,
    neg_beta,
    RELU: tl.constexpr,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < elements
    channel = offset % C
    d = _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU)
    y = _load_relu(x_pointer, offset, mask, RELU) * power(d, neg_beta, B75)
    tl.store(y_pointer + offset, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _plain_pool_forward_kernel(
    x_pointer,
    y_pointer,
    argmax_pointer,
    elements,
    C,
    H,
    W,
    before,
    after,
    alpha,
    k,
    neg_beta,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = target < elements
    channel = target % C
    pooled_h = (H - 3) // 2 + 1
    pooled_w = (W - 3) // 2 + 1
    position = target // C
    row = position // pooled_w % pooled_h * 2
    column = position % pooled_w * 2
    image = position // pooled_w // pooled_h
    best = tl.zeros((BLOCK,), tl.float32)
    best_tap = tl.zeros((BLOCK,), tl.int32)
    for tap in range(9):
        source = ((image * H + row + tap // 3) * W + column + tap % 3) * C + channel
        d = _denominator(x_pointer, source, channel, mask, C, before, after, alpha, k, True)
        y = _load_relu(x_pointer, source, mask, True) * power(d, neg_beta, B75)
        larger = (y > best) | (y != y) | (tap == 0)
        best = tl.where(larger, y, best)
        best_tap = tl.where(larger, tap, best_tap)
    tl.store(y_pointer + target, best.to(y_pointer.dtype.element_ty), mask=mask)
    tl.store(argmax_pointer + target, best_tap.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _plain_ratio_kernel(
    x_pointer,
    grad_pointer,
    argmax_pointer,
    ratio_pointer,
    elements,
    C,
    H,
    W,
    before,
    after,
    alpha,
    k,
    neg_beta,
    RELU: tl.constexpr,
    POOLED: tl.constexpr,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The summand of the gradient's second term, G * x * d^(-beta - 1), in fp32."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < elements
    channel = offset % C
    d = _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU)
    grad = _load_gradient(grad_pointer, argmax_pointer, offset, channel, mask, C, H, W, POOLED)
    x = _load_relu(x_pointer, offset, mask, RELU)
    ratio = grad * power(d, neg_beta, B75) * x * reciprocal(d, B75)
    tl.store(ratio_pointer + offset, ratio, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _plain_backward_kernel(
    x_pointer,
    grad_pointer,
    argmax_pointer,
    ratio_pointer,
    dx_pointer,
    elements,
    C,
    H,
    W,
    before,
    after,
    alpha,
    k,
    neg_beta,
    slope,
    RELU: tl.constexpr,
    POOLED: tl.constexpr,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < elements
    channel = offset % C
    total = tl.zeros((BLOCK,), tl.float32)
    for shift in range(-after, before + 1):
        inside = mask & (channel + shift >= 0) & (channel + shift < C)
        total += tl.load(ratio_pointer + offset + shift, mask=inside, other=0.0)
    d = _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU)
    grad = _load_gradient(grad_pointer, argmax_pointer, offset, channel, mask, C, H, W, POOLED)
    x = _load_relu(x_pointer, offset, mask, RELU)
    dx = grad * power(d, neg_beta, B75) - slope * x * total
    if RELU:
        dx = tl.where(x == 0.0, 0.0, dx)
    tl.store(dx_pointer + offset, dx.to(dx_pointer.dtype.element_ty), mask=mask)


def _launch(kernel: Any, elements: int, arguments: dict[str, Any]) -> Launch:
    block, warps = 256, 4
    return Launch(kernel, cdiv(elements, block), {**arguments, "BLOCK": block}, warps)


def scalars(size: int, alpha: float, beta: float, k: float) -> dict[str, float | bool]:
    """The numbers every kernel takes."""
    return {"alpha": alpha / size, "k": float(k), "neg_beta": -float(beta), "B75": beta == 0.75}


def slope(size: int, alpha: float, beta: float) -> float:
    """The factor of the gradient's second term."""
    return 2 * alpha * beta / size


def _reach(size: int, channels: int) -> dict[str, int]:
    """How far the window reaches either way; channels that do not exist need no loop."""
    return {"before": min(size // 2, channels - 1), "after": min((size - 1) // 2, channels - 1)}


def plain_forward(x: Tensor, y: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Launch:
    """LRN of x, (N, ..., C) and contiguous, into y."""
    channels = x.shape[-1]
    arguments = {
        "x_pointer": x,
        "y_pointer": y,
        "elements": x.numel(),
        "C": channels,
        "RELU": relu,
        **_reach(size, channels),
        **scalars(size, alpha, beta, k),
    }
    return _launch(_plain_forward_kernel, x.numel(), arguments)


def plain_pool_forward(
    x: Tensor, y: Tensor, argmax: Tensor, size: int, alpha: float, beta: float, k: float
) -> Launch:
    """3x3 stride-2 maximum of LRN of ReLU of x, (N, H, W, C) and contiguous, into y and argmax."""
    _, height, width, channels = x.shape
    arguments = {
        "x_pointer": x,
        "y_pointer": y,
        "argmax_pointer": argmax,
        "elements": y.numel(),
        "H": height,
        "W": width,
        "C": channels,
        **_reach(size, channels),
        **scalars(size, alpha, beta, k),
    }
    return _launch(_plain_pool_forward_kernel, y.numel(), arguments)


def plain_backward(
    grad: Tensor,
    argmax: Tensor | None,
    x: Tensor,
    dx: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    relu: bool,
) -> list[Launch]:
    """Gradient of `plain_forward`, or with an argmax of `plain_pool_forward`, into dx: two launches."""
    channels = x.shape[-1]
    common = {
        "x_pointer": x,
        "grad_pointer": grad,
        "argmax_pointer": grad if argmax is None else argmax,  # not read without pooling
        "ratio_pointer": torch.empty(x.shape, dtype=torch.float32, device=x.device),
        "elements": x.numel(),
        "C": channels,
        "H": x.shape[1],
        "W": x.shape[2],
        "RELU": relu,
        "POOLED": argmax is not None,
        **_reach(size, channels),
        **scalars(size, alpha, beta, k),
    }
    whole = {**common, "dx_pointer": dx, "slope": slope(size, alpha, beta)}
    return [
        _launch(_plain_ratio_kernel, x.numel(), common),
        _launch(_plain_backward_kernel, x.numel(), whole),
    ]
