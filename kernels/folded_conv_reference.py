"""A convolution over enlarged crops, computed on the images as they were: the readable definition.

Enlarged bilinearly by a whole factor F, pixel r of an axis lies at (2r + 1 - F) / 2F of the source, between
the pixels i and i + 1 with i the floor of that; beyond the edges the outermost pixel is repeated. A
convolution's output looks at `kernel` neighbours of the enlarged axis, hence at few of the source, and is
linear in them:

    sum over k of w[k] * enlarged[at + k] = sum over t of (sum over k of w[k] * U[k, t]) * source[start + t]

U depends on `at` only through its remainder by F, except where the kernel hangs over the edge of the crop and
misses some k: there are few different U, the phases of `Axis`. With one for the rows and one for the columns
the bracket is a kernel of `taps` x `taps` source pixels. Those of all pairs of phases (`fold`) replace the
weight. A mirrored crop is a crop of the mirrored image.

Enlarging 32 to 256 and cropping 224, AlexNet's 11x11 kernel with stride 4 becomes 3x3, 3x4, 4x3 and 4x4 ones,
and a crop uses two of the eight interior phases an axis, by turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Axis:
    """Which source pixels an axis of the convolution's output depends on, for every offset of the crop.

    Attributes:
        mixing: float64 (phases, kernel, taps), U above; the rows of taps in the convolution's padding are 0.
        span: int64 (phases,), the taps that are not zero for every k: the first `span`.
        phase: int64 (offsets, outputs).
        start: int64 (offsets, outputs), the first tap's pixel, counted in the padded source.
        pixels: int64 (padded,), the source pixel that each pixel of the padded source repeats.
    """

    mixing: Array
    span: Array
    phase: Array
    start: Array
    pixels: Array


@lru_cache(maxsize=64)
def axis(source: int, resize: int, crop: int, kernel: int, stride: int, padding: int) -> Axis:
    """The axis for `source` pixels resized to `resize`, a whole multiple, and cropped to `crop`."""
    twice = 2 * resize // source
    offset = np.arange(resize - crop + 1)[:, None, None]
    output = np.arange((crop + 2 * padding - kernel) // stride + 1)[:, None]
    at = output * stride - padding + np.arange(kernel)
    inside = (at >= 0) & (at < crop)
    left, share = np.divmod(2 * (at + offset) + 1 - twice // 2, twice)  # share / twice belongs to left + 1
    start = np.where(inside.any(axis=1), np.where(inside, left, source).min(axis=2), 0)
    taps = int((np.where(inside, left + (share > 0), start[..., None]).max(axis=2) - start).max()) + 1
    tap = np.arange(taps)
    left, share = (left - start[..., None])[..., None], share[..., None]
    weights = inside[..., None] * ((tap == left) * (twice - share) + (tap == left + 1) * share)
    different, phase = np.unique(weights.reshape(start.size, -1), axis=0, return_inverse=True)
    mixing = different.reshape(-1, kernel, taps) / twice
    before = max(0, -int(start.min()))
    after = max(0, int(start.max()) + taps - source)
    return Axis(
        mixing=mixing,
        span=taps - np.any(mixing != 0, axis=1)[:, ::-1].argmax(axis=1),
        phase=phase.reshape(start.shape),
        start=start + before,
        pixels=np.arange(-before, source + after).clip(0, source - 1),
    )


@dataclass(frozen=True, eq=False)
class Crops:
    """A batch before it is enlarged.

    Attributes:
        source: (B, H, W, 3), normalised, mirrored where the crop is, and padded as `Axis.pixels` says.
        tops, lefts: int64 (B,), the offsets of the crops, counted in the mirrored image where it is mirrored.
        rows, columns: the two axes.
    """

    source: Tensor
    tops: Tensor
    lefts: Tensor
    rows: Axis
    columns: Axis

    def split(self, size: int) -> list[Crops]:
        """Parts of so many crops, the last of what is left."""
        parts = zip(*(x.split(size) for x in (self.source, self.tops, self.lefts)), strict=True)
        return [replace(self, source=s, tops=t, lefts=x) for s, t, x in parts]


def crops(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    kernel_size: Sequence[int],
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Crops:
    """The batch that `fastalex.kernels.folded_conv2d` describes, in arithmetic of `dtype`."""
    height, width = images.shape[1:3]
    rows = axis(height, resize, crop, kernel_size[0], stride, padding)
    columns = axis(width, resize, crop, kernel_size[1], stride, padding)
    y, x = (torch.from_numpy(each.pixels).to(images.device) for each in (rows, columns))
    x = torch.where(flips[:, None], width - 1 - x, x)
    pixels = images[indices[:, None, None], y[:, None], x[:, None, :]]
    shift, scale = (torch.tensor(values, dtype=dtype, device=images.device) for values in (mean, std))
    source = (pixels.to(dtype) / 255 - shift) / scale
    tops, lefts = offsets.long().unbind(1)
    return Crops(source, tops, torch.where(flips, resize - crop - lefts, lefts), rows, columns)


def fold(weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """The kernels of all pairs of phases: (row phases, taps, column phases, taps, 3, out channels)."""
    channels, _, height, width = weight.shape
    y, x = _mixing(rows, weight), _mixing(columns, weight)
    lines = y.movedim(1, 2).flatten(0, 1) @ weight.permute(2, 3, 1, 0).reshape(height, -1)
    kernels = x.movedim(1, 2).flatten(0, 1) @ lines.view(-1, width, 3 * channels)
    return kernels.view(len(y), -1, len(x), x.shape[2], 3, channels)


def unfold(d_kernels: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """The gradient of the weight, (out channels, 3, kernel, kernel): the transpose of `fold`."""
    channels = d_kernels.shape[-1]
    y, x = _mixing(rows, d_kernels), _mixing(columns, d_kernels)
    lines = x.movedim(1, 0).flatten(1) @ d_kernels.flatten(4).flatten(0, 1).flatten(1, 2)
    weight = y.movedim(1, 0).flatten(1) @ lines.flatten(1)
    return weight.view(y.shape[1], x.shape[1], 3, channels).permute(3, 2, 0, 1)


def _mixing(each: Axis, like: Tensor) -> Tensor:
    return torch.from_numpy(each.mixing).to(like)


def _windows(batch: Crops) -> Iterator[tuple[int, int, tuple[Tensor, ...], Tensor]]:
    """For each pair of phases p, q: the outputs (image, row, column) that have it, and what they look at.

    The latter is (outputs, taps, taps, 3).
    """
    source, (rows, columns) = batch.source, (batch.rows, batch.columns)
    tensors = (rows.phase, rows.start, columns.phase, columns.start)
    row_phase, row_start, column_phase, column_start = (
        torch.from_numpy(each).to(source.device)[offset]
        for each, offset in zip(tensors, 2 * [batch.tops] + 2 * [batch.lefts], strict=True)
    )
    s, t = (torch.arange(each.mixing.shape[2], device=source.device) for each in (rows, columns))
    pair = row_phase[:, :, None] * len(columns.mixing) + column_phase[:, None, :]
    pairs, counts = pair.unique(return_counts=True)
    by_pair = pair.flatten().argsort().split(counts.tolist())
    for outputs, number in zip(by_pair, pairs.tolist(), strict=True):
        p, q = divmod(number, len(columns.mixing))
        places = torch.unravel_index(outputs, pair.shape)
        n, y, x = (each[:, None, None] for each in places)
        yield p, q, places, source[n, row_start[n, y] + s[:, None], column_start[n, x] + t]


def folded_conv2d(batch: Crops, kernels: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The operator's definition, of a weight that `fold` folded: (B, out channels, H, W), channels-last.

    The arithmetic is in the kernels' dtype.
    """
    out = empty_output(batch, kernels, dtype)
    pixels = out.permute(0, 2, 3, 1)
    for p, q, places, window in _windows(batch):
        pixels[places] = (torch.einsum("mstc,stco->mo", window, kernels[p, :, q]) + bias).to(dtype)
    return out


def folded_conv2d_backward(grad: Tensor, batch: Crops) -> tuple[Tensor, Tensor]:
    """The gradients of kernels, for `unfold`, and bias, in the source's dtype, from that of the result."""
    d_kernels = zero_kernels(batch, grad.shape[1])
    pixels = grad.permute(0, 2, 3, 1).to(d_kernels.dtype)
    for p, q, places, window in _windows(batch):
        d_kernels[p, :, q] = torch.einsum("mstc,mo->stco", window, pixels[places])
    return d_kernels, pixels.sum((0, 1, 2))


def zero_kernels(batch: Crops, channels: int) -> Tensor:
    """Room for the sum of the kernels' gradients: the shape of `fold`, in the source's dtype."""
    (row_phases, _, row_taps), (column_phases, _, column_taps) = (
        each.mixing.shape for each in (batch.rows, batch.columns)
    )
    return batch.source.new_zeros((row_phases, row_taps, column_phases, column_taps, 3, channels))


def empty_output(batch: Crops, kernels: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the result."""
    height, width = batch.rows.phase.shape[1], batch.columns.phase.shape[1]
    return torch.empty(
        (len(batch.tops), kernels.shape[-1], height, width),
        dtype=dtype,
        device=kernels.device,
        memory_format=torch.channels_last,
    )
