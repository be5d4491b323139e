"""Resize, crop, flip and normalise on the CPU: a row at a time, each source row once.

Resizing is separable. A source row is converted and normalised (the weights of a pixel sum to 1, so that may
come first), stretched or shrunk to the width of the crop, already mirrored if the crop is, and kept; an
output row is then a weighted sum of two such rows, or of more where the image shrinks, rounded and written:

    source row -> (x / 255 - mean) / std -> crop x 3 floats, kept in a ring of `taps` rows
    output row y = sum over k of weight[y, k] * ring[(first[y] + k) % taps]

Enlarging 32 pixels to 256, the first line runs for 32 rows and the second for 224: it is the second that is
vectorised, and what it writes that takes the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ._numba_simd import LANES, bits, fma, inline, jit, load, splat, store, store_partial
from .lrn_numba import _run

f32 = np.float32


@lru_cache(maxsize=64)
def _taps(source: int, resized: int) -> tuple[Any, Any]:
    """For each resized pixel the first source pixel it depends on, and the weights of it and those after it.

    int64 (resized,) and float32 (resized, taps); the weights sum to 1 and first + taps never passes the end.
    The filter is the triangle of `augment_reference`, in whole numbers.
    """
    i, j = np.arange(resized)[:, None], np.arange(source)
    weights = np.maximum(2 * max(source, resized) - np.abs((2 * j + 1) * resized - (2 * i + 1) * source), 0)
    taps = int((weights > 0).sum(axis=1).max())
    first = np.minimum((weights > 0).argmax(axis=1), source - taps)
    weights = np.take_along_axis(weights, first[:, None] + np.arange(taps), axis=1)
    return first, (weights / weights.sum(axis=1, keepdims=True)).astype(f32)


@inline
def _normalise_row(images, at, line, scale, shift):
    for p in range(0, len(line), 3):
        for c in range(3):
            line[p + c] = f32(images[at + p + c]) * scale[c] + shift[c]


@inline
def _resize_row(line, first, weights, left, flip, row, at, crop):
    """The part of `line` that is in the crop, resized and perhaps mirrored, to row[at:]."""
    column = left + crop - 1 if flip else left
    step = -1 if flip else 1
    taps = weights.shape[1]
    for to in range(at, at + 3 * crop, 3):
        p = 3 * first[column]
        red, green, blue = f32(0), f32(0), f32(0)
        for k in range(taps):
            weight = weights[column, k]
            red += weight * line[p]
            green += weight * line[p + 1]
            blue += weight * line[p + 2]
            p += 3
        row[to], row[to + 1], row[to + 2] = red, green, blue
        column += step


@inline
def _write(out, at, total, left):
    if left >= LANES:
        store(out, at, total)
    else:
        store_partial(out, at, total, left)


@jit(error_model="numpy")
def _augment(
    start, stop, images, height, width, indices, offsets, flips, views, crop,
    first_row, row_weights, first_column, column_weights, scale, shift, out,
):  # fmt: skip
    """Outputs start .. stop - 1; `images` and `out` are flat."""
    taps = row_weights.shape[1]
    length = 3 * crop
    padded = (length + LANES - 1) // LANES * LANES
    ring = np.zeros(taps * padded, np.float32)
    line = np.empty(3 * width, np.float32)
    for n in range(start, stop):
        image = indices[n // views] * height
        view = n % views if views > 1 else n
        top, left, flip = offsets[view, 0], offsets[view, 1], flips[view]
        done = first_row[top]  # source rows before this one are in the ring, or not needed
        for y in range(crop):
            first = first_row[top + y]
            while done < first + taps:
                _normalise_row(images, (image + done) * 3 * width, line, scale, shift)
                to = done % taps * padded
                _resize_row(line, first_column, column_weights, left, flip, ring, to, crop)
                done += 1
            at = (n * crop + y) * length
            upper = first % taps * padded
            weight = splat(row_weights[top + y, 0])
            if taps == 2:
                lower = padded - upper
                other = splat(row_weights[top + y, 1])
                for e in range(0, length, LANES):
                    total = fma(other, load(ring, lower + e), weight * load(ring, upper + e))
                    _write(out, at + e, total, length - e)
            else:
                for e in range(0, length, LANES):
                    total = weight * load(ring, upper + e)
                    for k in range(1, taps):
                        row = (first + k) % taps * padded
                        total = fma(splat(row_weights[top + y, k]), load(ring, row + e), total)
                    _write(out, at + e, total, length - e)


@jit(parallel=True)
def _parallel_augment(
    tasks, count, images, height, width, indices, offsets, flips, views, crop,
    first_row, row_weights, first_column, column_weights, scale, shift, out,
):  # fmt: skip
    for task in numba.prange(tasks):
        _augment(
            task * count // tasks, (task + 1) * count // tasks,
            images, height, width, indices, offsets, flips, views, crop,
            first_row, row_weights, first_column, column_weights, scale, shift, out,
        )  # fmt: skip


def augment(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    views: int,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """As `augment_reference.augment`, on the CPU; indices and offsets must be in range."""
    count = len(indices) * views
    out = torch.empty((count, 3, crop, crop), dtype=dtype, memory_format=torch.channels_last)
    height, width = images.shape[1:3]
    deviations = np.array(std)
    _run(
        _augment, _parallel_augment, count,
        bits(images), height, width, bits(indices), offsets.numpy(), flips.numpy(), views, crop,
        *_taps(height, resize), *_taps(width, resize),
        (1 / (255 * deviations)).astype(f32), (-np.array(mean) / deviations).astype(f32),
        bits(out.permute(0, 2, 3, 1)),
    )  # fmt: skip
    return out
