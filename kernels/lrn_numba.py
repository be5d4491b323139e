# mypy: disallow-untyped-defs=False
"""Local response normalisation on the CPU: one pass over memory, all arithmetic in registers.

The layout is channels-last: a pixel's channels are neighbours in memory, and so is the window. A kernel
walks over a pixel in blocks of 16 channels and keeps three of them at hand, so that the window's sum is
four shuffles of registers and four additions:

    previous block   | current block   | next block
    .. s12 s13 s14 s15 s16 s17 ...  s31  s32 s33 ..        squares; window of s16 with size 5: s14 .. s18

The gradient has the same shape twice: the squares run one block ahead of the summands of the second sum,
which run one block ahead of the result. Nothing but the input and the gradient is read, nothing but the
result is written. Other layouts are copied to channels-last and back.

x^(-3/4), AlexNet's exponent, is a guess from the bits of x and one polynomial (`_inverse_power`); dividing
and two square roots would take longer than everything else together.

What takes the time on two cores is memory: see `benchmarks/results/`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import lrn_reference as reference
from ._numba_simd import (
    LANES,
    bits,
    concatenated,
    first_lanes,
    fma,
    guess_inverse_fourth_root,
    inline,
    jit,
    load,
    power,
    splat,
    store,
    where,
)

f32 = np.float32

# --- one block of 16 channels -----------------------------------------------------------------------------


@inline
def _inverse_power(d, beta):
    """d^-beta. For 0.75, within 3e-7 of it for every positive normal d, 0 for infinity, NaN for NaN.

    With y near d^(-1/4) and e = 1 - d y^4, d^(-3/4) is y^3 (1 - e)^(-3/4): a polynomial in e, of degree 5
    and fitted over the values that e can take.
    """
    if beta != f32(0.75):
        return power(d, splat(-beta))
    y = guess_inverse_fourth_root(d)
    y2 = y * y
    e = splat(f32(1)) - d * y2 * y2
    p = fma(e, splat(f32(0.44349779)), splat(f32(0.56931322)))
    p = fma(e, p, splat(f32(0.60309923)))
    p = fma(e, p, splat(f32(0.65623876)))
    p = fma(e, p, splat(f32(0.7499944)))
    p = fma(e, p, splat(f32(1)))
    return where(d == splat(f32(np.inf)), splat(f32(0)), y * y2 * p)


@inline
def _window_sum(previous, current, following, before, after):
    """Sum over channels c - before .. c + after for the 16 channels c of `current`; both at most 16."""
    total = current
    if before == 2 and after == 2:
        total = total + concatenated(previous, current, 15) + concatenated(current, following, 1)
        return total + (concatenated(previous, current, 14) + concatenated(current, following, 2))
    zero = splat(f32(0))
    low, high = current, following
    for _ in range(after):  # move everything down a lane, add
        low, high = concatenated(low, high, 1), concatenated(high, zero, 1)
        total = total + low
    low, high = previous, current
    for _ in range(before):
        low, high = concatenated(zero, low, 15), concatenated(low, high, 15)
        total = total + high
    return total


@inline
def _activate(v, relu):
    """max(v, 0) that lets NaN through, if `relu`."""
    zero = splat(f32(0))
    return where(zero > v, zero, v) if relu else v


# --- one pixel --------------------------------------------------------------------------------------------


@inline
def _forward_pixel(x, at, y, to, stored, channels, before, after, scale, beta, k, relu):
    """The pixel at x[at:] normalised into the first `stored` lanes from y[to:]."""
    previous = splat(f32(0))  # names of squares; `v` belongs to `current`
    v = _activate(load(x, at, channels), relu)
    current = v * v
    for c in range(0, channels, LANES):
        next_v = _activate(load(x, at + c + LANES, channels - c - LANES), relu)
        following = next_v * next_v
        d = fma(splat(scale), _window_sum(previous, current, following, before, after), splat(k))
        store(y, to + c, v * _inverse_power(d, beta), stored - c)
        previous, current, v = current, following, next_v


@inline
def _backward_pixel(g, g_at, x, at, dx, channels, before, after, scale, beta, k, relu):
    """The gradient of the pixel at x[at:] into dx[at:], from that of its result at g[g_at:]."""
    zero = splat(f32(0))
    factor = splat(f32(-2) * scale * beta)
    v = _activate(load(x, at, channels), relu)
    previous, current = zero, v * v  # squares, of the block before and of the block at c
    q_previous, q = zero, zero  # summands of the second sum, one block behind
    last_v, last_scaled = zero, zero
    for c in range(0, channels + LANES, LANES):
        left = channels - c
        next_v = _activate(load(x, at + c + LANES, left - LANES), relu)
        following = next_v * next_v
        scaled, q_next = zero, zero
        if left > 0:
            d = fma(splat(scale), _window_sum(previous, current, following, before, after), splat(k))
            scaled = load(g, g_at + c, left) * _inverse_power(d, beta)
            q_next = scaled * v / d
        if left < LANES:  # no summand comes from a channel that does not exist, not even 0 / 0
            q_next = where(first_lanes(left), q_next, zero)
        if c > 0:
            # The windows that hold a channel reach as far as its own window does, mirrored.
            total = _window_sum(q_previous, q, q_next, after, before)
            dv = fma(factor * last_v, total, last_scaled)
            dv = where(last_v == zero, zero, dv) if relu else dv
            store(dx, at + c - LANES, dv, left + LANES)
        previous, current = current, following
        q_previous, q = q, q_next
        last_v, last_scaled, v = v, scaled, next_v


# --- kernels: each works on a range of pixels or rows, and in parallel on several -------------------------


@jit()
def _forward(start, stop, x, y, channels, before, after, scale, beta, k, relu):
    for at in range(start * channels, stop * channels, channels):
        _forward_pixel(x, at, y, at, channels, channels, before, after, scale, beta, k, relu)


@jit()
def _backward(start, stop, g, x, dx, channels, before, after, scale, beta, k, relu):
    for at in range(start * channels, stop * channels, channels):
        _backward_pixel(g, at, x, at, dx, channels, before, after, scale, beta, k, relu)


@jit()
def _pool_forward(start, stop, x, y, argmax, shape, channels, before, after, scale, beta, k):
    """Pooled rows start .. stop - 1, counted through all images; three normalised rows are kept in cache."""
    height, width, pooled_height, pooled_width = shape
    padded = (channels + LANES - 1) // LANES * LANES
    rows = np.empty(3 * width * padded, np.float32)
    done = -1  # the last row in `rows`, counted through all images
    for pooled in range(start, stop):
        image, i = divmod(pooled, pooled_height)
        top = image * height + 2 * i
        for row in range(max(top, done + 1), top + 3):
            for w in range(width):
                to = (row % 3 * width + w) * padded
                at = (row * width + w) * channels
                _forward_pixel(x, at, rows, to, padded, channels, before, after, scale, beta, k, True)
        done = top + 2
        for j in range(pooled_width):
            out = (pooled * pooled_width + j) * channels
            for c in range(0, channels, LANES):
                best = load(rows, (top % 3 * width + 2 * j) * padded + c, LANES)
                index = splat(f32(0))
                for position in range(1, 9):
                    row, column = top + position // 3, 2 * j + position % 3
                    value = load(rows, (row % 3 * width + column) * padded + c, LANES)
                    wins = (value > best) | (value != value)  # the first of equals, and any NaN
                    best = where(wins, value, best)
                    index = where(wins, splat(f32(position)), index)
                store(y, out + c, best, channels - c)
                store(argmax, out + c, index, channels - c)


@jit()
def _pool_backward(start, stop, g, argmax, x, dx, shape, channels, before, after, scale, beta, k):
    """Rows start .. stop - 1 of the input, counted through all images."""
    height, width, pooled_height, pooled_width = shape
    spread = np.empty((channels + LANES - 1) // LANES * LANES, np.float32)  # one pixel's gradient
    for row in range(start, stop):
        image, h = divmod(row, height)
        for w in range(width):
            for c in range(0, channels, LANES):
                total = splat(f32(0))
                for i in range(max(h - 1, 0) // 2, min(h // 2 + 1, pooled_height)):
                    for j in range(max(w - 1, 0) // 2, min(w // 2 + 1, pooled_width)):
                        at = ((image * pooled_height + i) * pooled_width + j) * channels + c
                        here = load(argmax, at, channels - c) == splat(f32((h - 2 * i) * 3 + w - 2 * j))
                        total = total + where(here, load(g, at, channels - c), splat(f32(0)))
                store(spread, c, total, LANES)
            at = (row * width + w) * channels
            _backward_pixel(spread, 0, x, at, dx, channels, before, after, scale, beta, k, True)


@jit(parallel=True)
def _parallel_forward(tasks, count, x, y, channels, before, after, scale, beta, k, relu):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _forward(start, stop, x, y, channels, before, after, scale, beta, k, relu)


@jit(parallel=True)
def _parallel_backward(tasks, count, g, x, dx, channels, before, after, scale, beta, k, relu):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _backward(start, stop, g, x, dx, channels, before, after, scale, beta, k, relu)


@jit(parallel=True)
def _parallel_pool_forward(tasks, count, x, y, argmax, shape, channels, before, after, scale, beta, k):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _pool_forward(start, stop, x, y, argmax, shape, channels, before, after, scale, beta, k)


@jit(parallel=True)
def _parallel_pool_backward(tasks, count, g, argmax, x, dx, shape, channels, before, after, scale, beta, k):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _pool_backward(start, stop, g, argmax, x, dx, shape, channels, before, after, scale, beta, k)


# --- tensors ----------------------------------------------------------------------------------------------

_one_caller = threading.Lock()  # Numba's fallback threading layer aborts the process on a second one


def _run(serial: Any, parallel: Any, count: int, *args: Any) -> None:
    """Work 0 .. count - 1 spread over as many threads as PyTorch uses.

    With one thread, as in a forked data-loading worker, no thread pool is touched at all.
    """
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, count)
    if threads <= 1:
        serial(0, count, *args)
        return
    with _one_caller:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            parallel(threads, count, *args)
        finally:
            numba.set_num_threads(before)


def _options(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Any, ...]:
    """Channels, reach of the window before and after (no farther than there are channels), constants."""
    reach = x.shape[1] - 1
    before, after = min(size // 2, reach), min((size - 1) // 2, reach)
    return x.shape[1], before, after, f32(alpha / size), f32(beta), f32(k)


def _fits(x: Tensor, size: int) -> bool:
    """Whether the window reaches no farther than one block to either side."""
    return min(size // 2, x.shape[1] - 1) <= LANES


def _pixels(x: Tensor) -> Tensor:
    """`x` as dense (N, ..., C), without a copy if it is channels-last already."""
    return x.movedim(1, -1).contiguous()


def _fill(like: Tensor, compute: Callable[[Tensor], None]) -> Tensor:
    """A tensor like `like` filled by `compute`, which writes to a dense (N, ..., C) one."""
    out = torch.empty_like(like)
    pixels = out.movedim(1, -1)
    if pixels.is_contiguous():
        compute(pixels)
    else:
        dense = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        compute(dense)
        pixels.copy_(dense)
    return out


def lrn_forward(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """As `lrn_reference.lrn_forward`, for fp32, bf16 and fp16 on the CPU."""
    if x.numel() == 0 or not _fits(x, size):
        return reference.lrn_forward(x, size, alpha, beta, k, relu)
    pixels, options = _pixels(x), _options(x, size, alpha, beta, k)

    def compute(y: Tensor) -> None:
        _run(_forward, _parallel_forward, x.numel() // x.shape[1], bits(pixels), bits(y), *options, relu)

    return _fill(x, compute)


def lrn_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    """As `lrn_reference.lrn_backward`, for fp32, bf16 and fp16 on the CPU."""
    if x.numel() == 0 or not _fits(x, size):
        return reference.lrn_backward(grad, x, size, alpha, beta, k, relu)
    arrays = bits(_pixels(grad)), bits(_pixels(x))
    options = _options(x, size, alpha, beta, k)

    def compute(dx: Tensor) -> None:
        _run(_backward, _parallel_backward, x.numel() // x.shape[1], *arrays, bits(dx), *options, relu)

    return _fill(x, compute)


def lrn_max_pool_forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    """As `lrn_reference.lrn_max_pool_forward`, for fp32, bf16 and fp16 on the CPU."""
    if x.numel() == 0 or not _fits(x, size):
        return reference.lrn_max_pool_forward(x, size, alpha, beta, k)
    height, width = x.shape[2:]
    shape = height, width, (height - 3) // 2 + 1, (width - 3) // 2 + 1
    like = x[:, :, : shape[2], : shape[3]]  # its empty_like has the memory format of x
    pixels, options = _pixels(x), _options(x, size, alpha, beta, k)
    argmax = torch.empty_like(like, dtype=torch.uint8)

    def compute(y: Tensor) -> None:
        def compute_argmax(index: Tensor) -> None:
            rows = x.shape[0] * shape[2]
            arrays = bits(pixels), bits(y), bits(index)
            _run(_pool_forward, _parallel_pool_forward, rows, *arrays, shape, *options)

        nonlocal argmax
        argmax = _fill(argmax, compute_argmax)

    return _fill(like, compute), argmax


def lrn_max_pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """As `lrn_reference.lrn_max_pool_backward`, for fp32, bf16 and fp16 on the CPU."""
    if x.numel() == 0 or not _fits(x, size):
        return reference.lrn_max_pool_backward(grad, argmax, x, size, alpha, beta, k)
    shape = (*x.shape[2:], *grad.shape[2:])
    arrays = bits(_pixels(grad)), bits(_pixels(argmax)), bits(_pixels(x))
    options = _options(x, size, alpha, beta, k)

    def compute(dx: Tensor) -> None:
        rows = x.shape[0] * x.shape[2]
        _run(_pool_backward, _parallel_pool_backward, rows, *arrays, bits(dx), shape, *options)

    return _fill(x, compute)
