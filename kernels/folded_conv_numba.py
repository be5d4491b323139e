# mypy: disallow-untyped-defs=False
"""The folded convolution on the CPU: small matrix products on the source images, all sums in registers.

The outputs of a crop that share a pair of phases share a kernel of at most `taps` x `taps` x 3 numbers for
each of 96 channels. Taken together, their forward and backward passes are the loops of a matrix product with
96 columns, which are six registers of 16 channels:

    forward    4 outputs x 96 channels in registers; the 96 weights of a tap serve all four
    backward   3 colours x 96 channels of the kernel's gradient in registers, over some tens of outputs

Nothing is gathered into a matrix first: a tap is at a fixed distance from the output's first one. Each thread
owns some images in the forward pass and some pairs of phases in the backward pass, so that no two threads add
to the same gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import folded_conv_reference as reference
from ._numba_simd import LANES, bits, fma, inline, jit, load, pointer, run, splat, store
from .folded_conv_reference import Array, Axis, SourceCrops

f32 = np.float32
CHANNELS = 6 * LANES  # for 4 outputs they take 30 of AVX-512's 32 registers
HELD = 64  # outputs whose gradients the backward pass holds in fp32 at a time: 24 KiB

# --- 96 channels at a time --------------------------------------------------------------------------------


@inline
def _load(start, at):
    return (
        load(start, at), load(start, at + 16), load(start, at + 32),
        load(start, at + 48), load(start, at + 64), load(start, at + 80),
    )  # fmt: skip


@inline
def _store(start, at, v):
    store(start, at, v[0])
    store(start, at + 16, v[1])
    store(start, at + 32, v[2])
    store(start, at + 48, v[3])
    store(start, at + 64, v[4])
    store(start, at + 80, v[5])


@inline
def _fma(scalar, v, total):
    s = splat(scalar)
    return (
        fma(s, v[0], total[0]), fma(s, v[1], total[1]), fma(s, v[2], total[2]),
        fma(s, v[3], total[3]), fma(s, v[4], total[4]), fma(s, v[5], total[5]),
    )  # fmt: skip


# --- the outputs of an image that share a pair of phases --------------------------------------------------
#
# `rows` and `columns` are what `_tables` returns.


@inline
def _places(n, p, q, top, left, rows, columns, channels, source_at, out_at):
    """Write the positions of these outputs and of their windows in `source`; returns how many there are."""
    order_y, begin_y, start_y, _, _, outputs_y, padded_y = rows
    order_x, begin_x, start_x, _, _, outputs_x, padded_x = columns
    count = 0
    for i in range(begin_y[top, p], begin_y[top, p + 1]):
        y = order_y[top, i]
        from_y = (n * padded_y + start_y[top, y]) * padded_x
        to_y = (n * outputs_y + y) * outputs_x
        for j in range(begin_x[left, q], begin_x[left, q + 1]):
            x = order_x[left, j]
            source_at[count] = 3 * (from_y + start_x[left, x])
            out_at[count] = (to_y + x) * channels
            count += 1
    return count


@inline
def _four_outputs(
    source, windows, line, height, width, kernels, weights, next_line, channels, bias, block, out, to
):
    """Compute 96 channels, from `block` on, of the four outputs at `to` with windows from `windows` on."""
    a = _load(bias, block)
    b, c, d = a, a, a
    for s in range(height):
        weight = weights + s * next_line + block
        for e in range(s * line, s * line + 3 * width):
            w = _load(kernels, weight)
            a = _fma(source[windows[0] + e], w, a)
            b = _fma(source[windows[1] + e], w, b)
            c = _fma(source[windows[2] + e], w, c)
            d = _fma(source[windows[3] + e], w, d)
            weight += channels
    _store(out, to[0] + block, a)
    _store(out, to[1] + block, b)
    _store(out, to[2] + block, c)
    _store(out, to[3] + block, d)


@inline
def _outputs(start, stop, windows, to, source, tops, lefts, rows, columns, channels, kernels, bias, out):
    windows, to, source = pointer(windows), pointer(to), pointer(source)
    kernels, bias, out = pointer(kernels), pointer(bias), pointer(out)
    span_y, taps_y = rows[3], rows[4]
    span_x, taps_x = columns[3], columns[4]
    line, next_line = 3 * columns[6], len(span_x) * taps_x * 3 * channels
    for n in range(start, stop):
        for p in range(len(span_y)):
            for q in range(len(span_x)):
                count = _places(n, p, q, tops[n], lefts[n], rows, columns, channels, windows, to)
                if count == 0:
                    continue
                for extra in range(count, (count + 3) // 4 * 4):  # the last output, again
                    windows[extra], to[extra] = windows[count - 1], to[count - 1]
                weights = (p * taps_y * len(span_x) + q) * taps_x * 3 * channels
                for i in range(0, count, 4):
                    at = windows[i], windows[i + 1], windows[i + 2], windows[i + 3]
                    into = to[i], to[i + 1], to[i + 2], to[i + 3]
                    for block in range(0, channels, CHANNELS):
                        _four_outputs(
                            source, at, line, span_y[p], span_x[q],
                            kernels, weights, next_line, channels, bias, block, out, into,
                        )  # fmt: skip


@jit(error_model="numpy", fastmath={"contract"})
def _forward(start, stop, source, tops, lefts, rows, columns, channels, kernels, bias, out):
    """Compute images start .. stop - 1."""
    places = rows[5] * columns[5] + 3
    windows, to = np.empty(places, np.int64), np.empty(places, np.int64)
    _outputs(start, stop, windows, to, source, tops, lefts, rows, columns, channels, kernels, bias, out)


@jit(parallel=True)
def _parallel_forward(tasks, count, source, tops, lefts, rows, columns, channels, kernels, bias, out):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _forward(start, stop, source, tops, lefts, rows, columns, channels, kernels, bias, out)


# --- the gradients of kernels and bias --------------------------------------------------------------------


@inline
def _one_pixel(source, windows, first, e, grads, count, d_kernels, at, channels):
    """Add the contributions of `count` outputs to the 3 x 96 weights of the window's pixel at `e`."""
    red, green = _load(d_kernels, at), _load(d_kernels, at + channels)
    blue = _load(d_kernels, at + 2 * channels)
    for i in range(count):
        g = _load(grads, i * CHANNELS)
        pixel = windows[first + i] + e
        red = _fma(source[pixel], g, red)
        green = _fma(source[pixel + 1], g, green)
        blue = _fma(source[pixel + 2], g, blue)
    _store(d_kernels, at, red)
    _store(d_kernels, at + channels, green)
    _store(d_kernels, at + 2 * channels, blue)


@inline
def _kernels(
    start, stop, grads, windows, to,
    pairs, source, tops, lefts, rows, columns, channels, grad, d_kernels, d_bias,
):  # fmt: skip
    grads, windows, to, pairs, source = (
        pointer(grads), pointer(windows), pointer(to), pointer(pairs), pointer(source)
    )  # fmt: skip
    grad, d_kernels, d_bias = pointer(grad), pointer(d_kernels), pointer(d_bias)
    span_y, taps_y = rows[3], rows[4]
    span_x, taps_x = columns[3], columns[4]
    line, next_line = 3 * columns[6], len(span_x) * taps_x * 3 * channels
    for k in range(start, stop):
        p, q = pairs[k] // len(span_x), pairs[k] % len(span_x)
        weights = (p * taps_y * len(span_x) + q) * taps_x * 3 * channels
        for n in range(len(tops)):
            total = _places(n, p, q, tops[n], lefts[n], rows, columns, channels, windows, to)
            for first in range(0, total, HELD):
                count = min(HELD, total - first)
                for block in range(0, channels, CHANNELS):
                    sums = _load(d_bias, pairs[k] * channels + block)
                    for i in range(count):
                        g = _load(grad, to[first + i] + block)
                        _store(grads, i * CHANNELS, g)
                        sums = _fma(f32(1), g, sums)
                    _store(d_bias, pairs[k] * channels + block, sums)
                    for s in range(span_y[p]):
                        for t in range(span_x[q]):
                            at = weights + s * next_line + t * 3 * channels + block
                            e = s * line + 3 * t
                            _one_pixel(source, windows, first, e, grads, count, d_kernels, at, channels)


@jit(error_model="numpy", fastmath={"contract"})
def _backward(
    start, stop, pairs, source, tops, lefts, rows, columns, channels, grad, d_kernels, d_bias
):  # fmt: skip
    """Compute the pairs of phases pairs[start] .. pairs[stop - 1]; each is p * column phases + q."""
    places = rows[5] * columns[5]
    grads = np.empty(HELD * CHANNELS, np.float32)
    windows, to = np.empty(places, np.int64), np.empty(places, np.int64)
    _kernels(
        start, stop, grads, windows, to,
        pairs, source, tops, lefts, rows, columns, channels, grad, d_kernels, d_bias,
    )  # fmt: skip


@jit(parallel=True)
def _parallel_backward(
    tasks, count, pairs, source, tops, lefts, rows, columns, channels, grad, d_kernels, d_bias
):  # fmt: skip
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _backward(start, stop, pairs, source, tops, lefts, rows, columns, channels, grad, d_kernels, d_bias)


# --- the operator -----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _tables(each: Axis) -> tuple[Any, ...]:
    """The outputs of each offset sorted by phase, where each phase begins among them, and `each`'s fields."""
    order = each.phase.argsort(axis=1, kind="stable")
    phases, _, taps = each.mixing.shape
    begin = (each.phase[:, :, None] < np.arange(phases + 1)).sum(axis=1)
    return order, begin, each.start, each.span, taps, order.shape[1], len(each.pixels)


def _balanced_pairs(batch: SourceCrops, rows: tuple[Any, ...], columns: tuple[Any, ...]) -> Array:
    """The pairs of phases, ordered so that equal parts are about equal work for each thread."""
    outputs = [
        np.diff(begin)[at.numpy()] * span
        for (_, begin, _, span, *_), at in ((rows, batch.tops), (columns, batch.lefts))
    ]
    heaviest_first = np.argsort(-(outputs[0].T @ outputs[1]).ravel(), kind="stable")
    threads = torch.get_num_threads()
    return np.concatenate([heaviest_first[thread::threads] for thread in range(threads)])


def _arguments(batch: SourceCrops) -> tuple[Any, ...]:
    tops, lefts = batch.tops.contiguous().numpy(), batch.lefts.contiguous().numpy()
    return bits(batch.source), tops, lefts, _tables(batch.rows), _tables(batch.columns)


def folded_conv2d(batch: SourceCrops, kernels: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """As `folded_conv_reference.folded_conv2d`, for fp32 kernels on the CPU."""
    channels = kernels.shape[-1]
    if channels % CHANNELS:
        return reference.folded_conv2d(batch, kernels, bias, dtype)
    out = reference.empty_output(batch, kernels, dtype)
    run(
        _forward, _parallel_forward, len(batch.tops),
        *_arguments(batch), channels, bits(kernels), bits(bias.contiguous()), bits(out.permute(0, 2, 3, 1)),
    )  # fmt: skip
    return out


def folded_conv2d_backward(grad: Tensor, batch: SourceCrops) -> tuple[Tensor, Tensor]:
    """As `folded_conv_reference.folded_conv2d_backward`, for an fp32 source on the CPU."""
    channels = grad.shape[1]
    if channels % CHANNELS:
        return reference.folded_conv2d_backward(grad, batch)
    source, tops, lefts, rows, columns = _arguments(batch)
    pairs = _balanced_pairs(batch, rows, columns)
    d_kernels = reference.zero_kernels(batch, channels)
    d_bias = torch.zeros((len(pairs), channels), dtype=torch.float32)
    run(
        _backward, _parallel_backward, len(pairs),
        pairs, source, tops, lefts, rows, columns, channels,
        bits(grad.permute(0, 2, 3, 1).contiguous()), bits(d_kernels), bits(d_bias),
    )  # fmt: skip
    return d_kernels, d_bias.sum(0)
