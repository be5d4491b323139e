# mypy: disallow-untyped-defs=False
"""Local response normalisation on the CPU: one pass over memory, all arithmetic in registers.

The layout is channels-last: a pixel's channels are neighbours in memory, and so is the window. A kernel
walks over a pixel in blocks of 16 channels and keeps three blocks in registers, so that the window's sum
takes four shuffles of registers and four additions:

    previous block   | current block   | next block
    .. s12 s13 s14 s15 s16 s17 ...  s31  s32 s33 ..        squares; window of s16 with size 5: s14 .. s18

The gradient does this twice: the squares run one block ahead of the summands of the second sum, which run
one block ahead of the result. Only the input and the gradient are read, only the result is written. Other
layouts are copied to channels-last and back.

d^(-3/4), AlexNet's power, is a guess from the bits of d and one polynomial, or for bf16 two estimates
(`_inverse_power`); a division and two square roots would take longer than everything else together.

On two cores most of the time goes to memory: see `benchmarks/results/`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import lrn_reference as reference
from ._layout import empty_pixels, finish, pixels
from ._numba_simd import (
    LANES,
    absolute,
    bits,
    bytes_equal,
    concatenated,
    estimate_inverse_square_root,
    estimates_suffice,
    exceeds,
    first_lanes,
    fma,
    guess_inverse_fourth_root,
    inline,
    jit,
    load,
    load_partial,
    pointer,
    power,
    run,
    splat,
    store,
    store_partial,
    where,
)

f32 = np.float32

# --- one block of 16 channels -----------------------------------------------------------------------------
#
# `general` is None for AlexNet's case (a window of 5, the exponent 3/4, whole blocks of channels), and
# (before, after, beta) for all others. Numba compiles a kernel for each type of its arguments, so AlexNet's
# kernel contains no code of the general case, which would cost it registers.


@inline
def _load(array, at, left, general):
    """The block at `at`, of which `left` channels exist: lanes beyond them are 0."""
    if left >= LANES:
        return load(array, at)
    if general is None or left <= 0:
        return splat(f32(0))
    return load_partial(array, at, left)


@inline
def _bytes_equal(array, at, byte, left, general):
    if general is None or left >= LANES:
        return bytes_equal(array, at, byte)
    return load_partial(array, at, left) == splat(f32(byte))


@inline
def _store(array, at, value, left, general):
    if general is None or left >= LANES:
        store(array, at, value)
    else:
        store_partial(array, at, value, left)


@inline
def _load_input(x, at, left, floor, general):
    """max(v, floor), but NaN stays NaN. `floor` is 0 for ReLU and NaN for none: nothing is below NaN."""
    v = _load(x, at, left, general)
    return where(splat(floor) > v, splat(floor), v)


@inline
def _inverse_power(d, x, general):
    """d^-beta. For beta = 3/4, d must be positive and normal, infinity (giving 0) or NaN.

    For bf16, with z near d^(-1/2), d^(-3/4) is z^2 z^(-1/2): two estimates with a relative error of at most
    1.6e-4, where rounding to bf16 has up to 39e-4. Otherwise the error is at most 3e-7: with y near d^(-1/4)
    and e = d y^4 - 1, d^(-3/4) is y^3 (1 + e)^(-3/4), and the power of 1 + e is a polynomial of degree 5
    fitted over the range of e.
    """
    if general is not None:
        return power(d, splat(-general[2]))
    infinite = d == splat(f32(np.inf))
    if estimates_suffice(x):
        z = estimate_inverse_square_root(d)
        return where(infinite, splat(f32(0)), z * z * estimate_inverse_square_root(z))
    y = guess_inverse_fourth_root(d)
    y2 = y * y
    e = fma(d * y2, y2, splat(f32(-1)))
    p = fma(e, splat(f32(-0.44349779)), splat(f32(0.56931322)))
    p = fma(e, p, splat(f32(-0.60309923)))
    p = fma(e, p, splat(f32(0.65623876)))
    p = fma(e, p, splat(f32(-0.7499944)))
    p = fma(e, p, splat(f32(1)))
    return where(infinite, splat(f32(0)), y * y2 * p)


@inline
def _window_sum(previous, current, following, mirrored, general):
    """Sum over the window of each of the 16 channels of `current`.

    With `mirrored`, sum over the channels whose windows hold it: the same with `before` and `after` swapped.
    """
    if general is None:
        near = concatenated(previous, current, 15) + concatenated(current, following, 1)
        far = concatenated(previous, current, 14) + concatenated(current, following, 2)
        return current + near + far
    before, after, _ = general
    if mirrored:
        before, after = after, before
    zero, total = splat(f32(0)), current
    low, high = current, following
    for _ in range(after):  # move everything down a lane, add
        low, high = concatenated(low, high, 1), concatenated(high, zero, 1)
        total = total + low
    low, high = previous, current
    for _ in range(before):
        low, high = concatenated(zero, low, 15), concatenated(low, high, 15)
        total = total + high
    return total


# --- one pixel --------------------------------------------------------------------------------------------


@inline
def _forward_pixel(x, at, y, to, stored, channels, scale, k, floor, general, unsigned):
    """Normalise the pixel at x[at:] into the first `stored` lanes of y[to:]; `unsigned`: store |y|."""
    v = _load_input(x, at, channels, floor, general)
    previous, current = splat(f32(0)), v * v  # the squares of the block before, and of this one
    for c in range(0, channels, LANES):
        next_v = _load_input(x, at + c + LANES, channels - c - LANES, floor, general)
        following = next_v * next_v
        d = fma(splat(scale), _window_sum(previous, current, following, False, general), splat(k))
        result = v * _inverse_power(d, x, general)
        _store(y, to + c, absolute(result) if unsigned else result, stored - c, general)
        previous, current, v = current, following, next_v


@inline
def _load_if(exists, position, g, argmax, at, left, general):
    """The gradient of the pooled block at `at`, in the channels whose maximum was at `position`."""
    zero = splat(f32(0))
    if exists:
        return where(_bytes_equal(argmax, at, position, left, general), _load(g, at, left, general), zero)
    return zero


@inline
def _load_gradient(g, at, pooling, left, general):
    """The gradient of a block of the result; with pooling, summed over the up to four windows that hold it.

    `pooling` is None or describes the last window that could hold the pixel: argmax, the pixel's position in
    that window, the distance to the window above, whether four windows exist (this one, the one before it,
    the one above, and the one before that), and the number of channels.
    """
    if pooling is None:
        return _load(g, at, left, general)
    argmax, position, back, here, before, above, corner, channels = pooling
    total = _load_if(here, position, g, argmax, at, left, general)
    total = total + _load_if(before, position + 2, g, argmax, at - channels, left, general)
    total = total + _load_if(above, position + 6, g, argmax, at - back, left, general)
    return total + _load_if(corner, position + 8, g, argmax, at - back - channels, left, general)


@inline
def _backward_pixel(g, g_at, pooling, x, at, dx, channels, scale, k, factor, floor, general):
    """Write the gradient of the pixel at x[at:] to dx[at:], from that of its result at g[g_at:]."""
    zero = splat(f32(0))
    v = _load_input(x, at, channels, floor, general)
    previous, current = zero, v * v  # the squares of the block before, and of the block at c
    q_previous, q = zero, zero  # the summands of the second sum, one block behind
    last_v, last_scaled = zero, zero
    for c in range(0, channels + LANES, LANES):
        left = channels - c
        next_v = _load_input(x, at + c + LANES, left - LANES, floor, general)
        following = next_v * next_v
        scaled, q_next = zero, zero
        if left > 0:
            d = fma(splat(scale), _window_sum(previous, current, following, False, general), splat(k))
            scaled = _load_gradient(g, g_at + c, pooling, left, general) * _inverse_power(d, x, general)
            q_next = scaled * v / d
            if general is not None:  # channels that do not exist add nothing, not even 0 / 0
                q_next = where(first_lanes(left), q_next, zero)
        if c > 0:
            total = _window_sum(q_previous, q, q_next, True, general)
            dv = fma(splat(factor) * last_v, total, last_scaled)
            dv = where(last_v == splat(floor), zero, dv)
            _store(dx, at + c - LANES, dv, left + LANES, general)
        previous, current = current, following
        q_previous, q = q, q_next
        last_v, last_scaled, v = v, scaled, next_v


# --- kernels: a serial one for a range of pixels or rows, and a parallel one that calls it ----------------


@jit()
def _forward(start, stop, x, y, channels, scale, k, factor, floor, general):
    x, y = pointer(x), pointer(y)
    for at in range(start * channels, stop * channels, channels):
        _forward_pixel(x, at, y, at, channels, channels, scale, k, floor, general, False)


@jit()
def _backward(start, stop, g, x, dx, channels, scale, k, factor, floor, general):
    g, x, dx = pointer(g), pointer(x), pointer(dx)
    for at in range(start * channels, stop * channels, channels):
        _backward_pixel(g, at, None, x, at, dx, channels, scale, k, factor, floor, general)


@inline
def _pool_rows(start, stop, rows, x, y, argmax, shape, channels, scale, k, factor, floor, general):
    height, width, pooled_height, pooled_width = shape
    padded = rows.size // (3 * width)
    rows, x, y, argmax = pointer(rows), pointer(x), pointer(y), pointer(argmax)
    done = -1  # the last row in `rows`, counted through all images
    for pooled in range(start, stop):
        image, i = divmod(pooled, pooled_height)
        top = image * height + 2 * i
        for row in range(max(top, done + 1), top + 3):
            for w in range(width):
                to = (row % 3 * width + w) * padded
                at = (row * width + w) * channels
                _forward_pixel(x, at, rows, to, padded, channels, scale, k, floor, general, True)
        done = top + 2
        for j in range(pooled_width):
            out = (pooled * pooled_width + j) * channels
            for c in range(0, channels, LANES):
                best = load(rows, (top % 3 * width + 2 * j) * padded + c)
                index = splat(f32(0))
                for position in range(1, 9):
                    row, column = top + position // 3, 2 * j + position % 3
                    value = load(rows, (row % 3 * width + column) * padded + c)
                    wins = exceeds(value, best)  # the first of equals stays, and NaN wins
                    best = where(wins, value, best)
                    index = where(wins, splat(f32(position)), index)
                _store(y, out + c, best, channels - c, general)
                _store(argmax, out + c, index, channels - c, general)


@jit()
def _pool_forward(start, stop, x, y, argmax, shape, channels, scale, k, factor, floor, general):
    """Compute pooled rows start .. stop - 1 of all images, keeping three normalised rows in the cache."""
    rows = np.empty(3 * shape[1] * ((channels + LANES - 1) // LANES * LANES), np.float32)
    _pool_rows(start, stop, rows, x, y, argmax, shape, channels, scale, k, factor, floor, general)


@jit()
def _pool_backward(start, stop, g, argmax, x, dx, shape, channels, scale, k, factor, floor, general):
    """Compute rows start .. stop - 1 of the input, counted through all images."""
    height, width, pooled_height, pooled_width = shape
    g, argmax, x, dx = pointer(g), pointer(argmax), pointer(x), pointer(dx)
    back = pooled_width * channels
    for row in range(start, stop):
        image, h = divmod(row, height)
        i, row_in_window = divmod(h, 2)
        is_row, is_row_above = i < pooled_height, row_in_window == 0 and i > 0
        for w in range(width):
            j, column_in_window = divmod(w, 2)
            is_column, is_column_before = j < pooled_width, column_in_window == 0 and j > 0
            pooling = (
                argmax,
                row_in_window * 3 + column_in_window,
                back,
                is_row and is_column,
                is_row and is_column_before,
                is_row_above and is_column,
                is_row_above and is_column_before,
                channels,
            )
            g_at = ((image * pooled_height + i) * pooled_width + j) * channels
            at = (row * width + w) * channels
            _backward_pixel(g, g_at, pooling, x, at, dx, channels, scale, k, factor, floor, general)


@jit(parallel=True)
def _parallel_forward(tasks, count, x, y, channels, scale, k, factor, floor, general):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _forward(start, stop, x, y, channels, scale, k, factor, floor, general)


@jit(parallel=True)
def _parallel_backward(tasks, count, g, x, dx, channels, scale, k, factor, floor, general):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _backward(start, stop, g, x, dx, channels, scale, k, factor, floor, general)


@jit(parallel=True)
def _parallel_pool_forward(tasks, count, x, y, argmax, shape, channels, scale, k, factor, floor, general):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _pool_forward(start, stop, x, y, argmax, shape, channels, scale, k, factor, floor, general)


@jit(parallel=True)
def _parallel_pool_backward(
    tasks, count, g, argmax, x, dx, shape, channels, scale, k, factor, floor, general
):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _pool_backward(start, stop, g, argmax, x, dx, shape, channels, scale, k, factor, floor, general)


# --- tensors ----------------------------------------------------------------------------------------------


def _options(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> tuple[Any, ...]:
    """The last arguments of every kernel: channels, scale, k, factor, floor, general."""
    channels = x.shape[1]
    general = None
    if not (size == 5 and beta == 0.75 and channels % LANES == 0 and alpha >= 0 and k >= 1e-30):
        # A window reaches no farther than the channels.
        general = min(size // 2, channels - 1), min((size - 1) // 2, channels - 1), f32(beta)
    floor = f32(0) if relu else f32(np.nan)
    return channels, f32(alpha / size), f32(k), f32(-2 * alpha * beta / size), floor, general


def takes(x: Tensor, size: int) -> bool:
    """Whether this module computes the result for `x`: a window reaches at most one block to either side."""
    return x.numel() > 0 and min(size // 2, x.shape[1] - 1) <= LANES


def lrn_forward(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """As `lrn_reference.lrn_forward`, for fp32, bf16 and fp16 on the CPU."""
    out = torch.empty_like(x)
    y = empty_pixels(out)
    options = _options(x, size, alpha, beta, k, relu)
    run(_forward, _parallel_forward, x.numel() // x.shape[1], bits(pixels(x)), bits(y), *options)
    return finish(out, y)


def lrn_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    """As `lrn_reference.lrn_backward`, for fp32, bf16 and fp16 on the CPU."""
    out = torch.empty_like(x)
    dx = empty_pixels(out)
    arrays = bits(pixels(grad)), bits(pixels(x)), bits(dx)
    options = _options(x, size, alpha, beta, k, relu)
    run(_backward, _parallel_backward, x.numel() // x.shape[1], *arrays, *options)
    return finish(out, dx)


def lrn_max_pool_forward(
    x: Tensor, size: int, alpha: float, beta: float, k: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `lrn_reference.lrn_max_pool_forward`, for fp32, bf16 and fp16 on the CPU.

    A bias is added in a pass of its own: on the CPU the convolution adds it for nothing, so AlexNet gives
    none to this function there.
    """
    if bias is not None:
        y, argmax = lrn_max_pool_forward(reference.add_bias(x, bias), size, alpha, beta, k)
        return y.to(x.dtype), argmax
    # The kernel compares absolute values as bits; a negative alpha or k makes some results negative.
    if alpha < 0 or k < 0:
        return reference.lrn_max_pool_forward(x, size, alpha, beta, k)
    height, width = x.shape[2:]
    shape = height, width, (height - 3) // 2 + 1, (width - 3) // 2 + 1
    like = x[:, :, : shape[2], : shape[3]]  # its empty_like has the memory format of x
    out, argmax_out = torch.empty_like(like), torch.empty_like(like, dtype=torch.uint8)
    y, argmax = empty_pixels(out), empty_pixels(argmax_out)
    arrays = bits(pixels(x)), bits(y), bits(argmax)
    options = _options(x, size, alpha, beta, k, True)
    run(_pool_forward, _parallel_pool_forward, x.shape[0] * shape[2], *arrays, shape, *options)
    return finish(out, y), finish(argmax_out, argmax)


def lrn_max_pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """As `lrn_reference.lrn_max_pool_backward`, for fp32, bf16 and fp16 on the CPU."""
    out = torch.empty_like(x)
    dx = empty_pixels(out)
    arrays = bits(pixels(grad)), bits(pixels(argmax)), bits(pixels(x)), bits(dx)
    shape = (*x.shape[2:], *grad.shape[2:])
    options = _options(x, size, alpha, beta, k, True)
    run(_pool_backward, _parallel_pool_backward, x.shape[0] * x.shape[2], *arrays, shape, *options)
    return finish(out, dx)


def lrn_max_pool_bias_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, bias: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor]:
    """As `lrn_reference.lrn_max_pool_bias_backward`; the gradient is summed in a pass of its own."""
    biased = reference.add_bias(x, bias)
    dx = lrn_max_pool_backward(grad.float(), argmax, biased, size, alpha, beta, k)
    return dx.to(x.dtype), dx.sum((0, 2, 3)).to(bias.dtype)
