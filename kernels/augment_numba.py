# mypy: disallow-untyped-defs=False
"""Resize, crop, flip, shift the colour and normalise on the CPU: row by row, each source row once.

Resizing is separable. A source row is converted and normalised (before resizing, which changes nothing: the
weights of a pixel sum to 1), then resized to the width of the crop, mirrored if the crop is, and kept. An
output row is a weighted sum of two such rows, or of more where the image shrinks, rounded and stored:

    source row -> (x / 255 + color - mean) / std -> crop x 3 floats, kept in a ring of `taps` rows
    output row y = sum over k of weight[y, k] * ring[(first[y] + k) % taps]

When 32 pixels are enlarged to 256, the first line runs for 32 rows and the second for 224. So the second is
the one that is vectorised, and storing its result takes most of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import augment_reference as reference
from ._numba_simd import LANES, bits, fma, inline, jit, load, pointer, run, splat, store, store_partial

f32 = np.float32


@lru_cache(maxsize=64)
def _taps(source: int, resized: int, start: int, count: int) -> tuple[Any, Any, int]:
    """For each resized pixel, the first source pixel that it depends on and the weights from that pixel on.

    Of the `resized` pixels only `count` are asked for, from `start` on. Returns int64 (count,), float32
    (count * taps,) and taps. The weights of a pixel sum to 1, and first + taps never passes the end. The
    filter is the triangle of `augment_reference`, in whole numbers.
    """
    i, j = np.arange(start, start + count)[:, None], np.arange(source)
    weights = np.maximum(2 * max(source, resized) - np.abs((2 * j + 1) * resized - (2 * i + 1) * source), 0)
    taps = int((weights > 0).sum(axis=1).max())
    first = np.minimum((weights > 0).argmax(axis=1), source - taps)
    weights = np.take_along_axis(weights, first[:, None] + np.arange(taps), axis=1)
    return first, (weights / weights.sum(axis=1, keepdims=True)).astype(f32).ravel(), taps


@inline
def _normalise_row(images, at, line, width, scale, shift):
    for p in range(0, 3 * width, 3):
        for c in range(3):
            line[p + c] = f32(images[at + p + c]) * scale[c] + shift[c]


@inline
def _resize_row(line, first, weights, taps, left, flip, row, at, crop):
    """Resize the part of `line` that is in the crop, mirror it if `flip`, and write it to row[at:]."""
    column = left + crop - 1 if flip else left
    step = -1 if flip else 1
    for to in range(at, at + 3 * crop, 3):
        p = 3 * first[column]
        red, green, blue = f32(0), f32(0), f32(0)
        for k in range(taps * column, taps * column + taps):
            red += weights[k] * line[p]
            green += weights[k] * line[p + 1]
            blue += weights[k] * line[p + 2]
            p += 3
        row[to] = red
        row[to + 1] = green
        row[to + 2] = blue
        column += step


@inline
def _write(out, at, total, left):
    if left >= LANES:
        store(out, at, total)
    else:
        store_partial(out, at, total, left)


@inline
def _outputs(
    start, stop, line, ring, shift, images, height, width, indices, offsets, flips, colors, views, crop,
    first_row, row_weights, row_taps, first_column, column_weights, column_taps, scale, gain, base, out,
):  # fmt: skip
    length = 3 * crop
    padded = ring.size // row_taps
    line, ring, images, out = pointer(line), pointer(ring), pointer(images), pointer(out)
    first_row, row_weights = pointer(first_row), pointer(row_weights)
    first_column, column_weights = pointer(first_column), pointer(column_weights)
    scale, gain, base = pointer(scale), pointer(gain), pointer(base)
    colors, shift = pointer(colors), pointer(shift)
    for n in range(start, stop):
        image = indices[n // views] * height
        for c in range(3):
            shift[c] = base[c] + colors[n // views * 3 + c] * gain[c]
        view = n % views if views > 1 else n
        top, left, flip = offsets[view, 0], offsets[view, 1], flips[view]
        done = first_row[top]  # source rows before this one are in the ring or not needed
        for y in range(crop):
            first, weights = first_row[top + y], row_taps * (top + y)
            while done < first + row_taps:
                _normalise_row(images, (image + done) * 3 * width, line, width, scale, shift)
                to = done % row_taps * padded
                _resize_row(line, first_column, column_weights, column_taps, left, flip, ring, to, crop)
                done += 1
            at = (n * crop + y) * length
            upper = first % row_taps * padded
            weight = splat(row_weights[weights])
            if row_taps == 2:
                lower = padded - upper
                other = splat(row_weights[weights + 1])
                for e in range(0, length, LANES):
                    total = fma(other, load(ring, lower + e), weight * load(ring, upper + e))
                    _write(out, at + e, total, length - e)
            else:
                for e in range(0, length, LANES):
                    total = weight * load(ring, upper + e)
                    for k in range(1, row_taps):
                        row = (first + k) % row_taps * padded
                        total = fma(splat(row_weights[weights + k]), load(ring, row + e), total)
                    _write(out, at + e, total, length - e)


@jit(error_model="numpy", fastmath={"contract"})
def _augment(
    start, stop, images, height, width, indices, offsets, flips, colors, views, crop,
    first_row, row_weights, row_taps, first_column, column_weights, column_taps, scale, gain, base, out,
):  # fmt: skip
    """Compute outputs start .. stop - 1; all arrays but `offsets` are flat."""
    line, shift = np.empty(3 * width, np.float32), np.empty(3, np.float32)
    ring = np.zeros(row_taps * ((3 * crop + LANES - 1) // LANES * LANES), np.float32)
    _outputs(
        start, stop, line, ring, shift, images, height, width, indices, offsets, flips, colors, views, crop,
        first_row, row_weights, row_taps, first_column, column_weights, column_taps, scale, gain, base, out,
    )  # fmt: skip


@jit(parallel=True)
def _parallel_augment(
    tasks, count, images, height, width, indices, offsets, flips, colors, views, crop,
    first_row, row_weights, row_taps, first_column, column_weights, column_taps, scale, gain, base, out,
):  # fmt: skip
    for task in numba.prange(tasks):
        _augment(
            task * count // tasks, (task + 1) * count // tasks,
            images, height, width, indices, offsets, flips, colors, views, crop,
            first_row, row_weights, row_taps, first_column, column_weights, column_taps,
            scale, gain, base, out,
        )  # fmt: skip


def write(
    out: Tensor,
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    colors: Tensor | None,
    views: int,
    resize: int,
    keep_shape: bool,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write what `augment_reference.augment` returns to `out`, on the CPU; indices and offsets in range."""
    height, width = images.shape[1:3]
    frame = reference.frame(height, width, resize, keep_shape)
    deviations = np.array(std)
    if colors is None:
        colors = torch.zeros((len(indices), 3))
    # Contiguous, because Numba would compile the kernel again for strided arrays.
    rows = (t.contiguous().numpy() for t in (indices, offsets, flips, colors.flatten()))
    run(
        _augment, _parallel_augment, len(out),
        bits(images), height, width, *rows, views, crop,
        *_taps(height, frame.height, frame.top, resize), *_taps(width, frame.width, frame.left, resize),
        (1 / (255 * deviations)).astype(f32), (1 / deviations).astype(f32),
        (-np.array(mean) / deviations).astype(f32),
        bits(out.permute(0, 2, 3, 1)),
    )  # fmt: skip
