"""A convolution of enlarged crops, computed on the source images: the readable definition.

When an axis is enlarged bilinearly by a whole factor F, pixel r lies at (2r + 1 - F) / 2F of the source:
between the pixels i and i + 1, where i is the floor of that. Beyond the edges the outermost pixel repeats.
An output of the convolution depends on `kernel` neighbours of the enlarged axis, hence on a few source
pixels, and is linear in them:

    sum over k of w[k] * enlarged[at + k] = sum over t of (sum over k of w[k] * U[k, t]) * source[start + t]

U depends on `at` only through its remainder by F, except where the kernel reaches over the edge of the crop
and misses some k. So there are few different U, the phases of `Axis`. With one phase for the rows and one for
the columns, the bracket is a kernel of `taps` x `taps` source pixels. The kernels of all pairs of phases
(`fold`) replace the weight. A mirrored crop is a crop of the mirrored image.

When 32 pixels are enlarged to 256 and cropped to 224, AlexNet's 11x11 kernel with stride 4 becomes kernels of
3x3, 3x4, 4x3 and 4x4, and a crop alternates between two of the eight interior phases on each axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


class FoldedConv(NamedTuple):
    """The arguments of the operator, in its order; `fastalex.kernels.folded_conv2d` describes them."""

    images: Tensor
    indices: Tensor
    offsets: Tensor
    flips: Tensor
    colors: Tensor | None
    weight: Tensor
    bias: Tensor
    resize: int
    crop: int
    mean: Sequence[float]
    std: Sequence[float]
    stride: int
    padding: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Axis:
    """The source pixels that the convolution's outputs on an axis depend on, for every offset of the crop.

    Attributes:
        mixing: float64 (phases, kernel, taps), U above; its rows for k in the convolution's padding are 0.
        span: int64 (phases,); the taps from `span` on are zero for every k.
        phase: int64 (offsets, outputs), the phase of each output.
        start: int64 (offsets, outputs), the pixel of an output's first tap, counted in the padded source.
        pixels: int64 (padded,), the source pixel that each pixel of the padded source repeats.
    """

    mixing: Array
    span: Array
    phase: Array
    start: Array
    pixels: Array


@lru_cache(maxsize=64)
def axis(source: int, resize: int, crop: int, kernel: int, stride: int, padding: int) -> Axis:
    """The axis for `source` pixels enlarged to `resize`, a whole multiple, and cropped to `crop`."""
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
class SourceCrops:
    """A batch before it is enlarged: the source images, and the position of each crop.

    Attributes:
        source: (B, H, W, 3), normalised with its colour, mirrored where the crop is, and padded as
            `Axis.pixels` says.
        tops, lefts: int64 (B,), the offsets of the crops in the enlarged image, mirrored where the crop is.
        rows, columns: the two axes.
    """

    source: Tensor
    tops: Tensor
    lefts: Tensor
    rows: Axis
    columns: Axis

    def split(self, size: int) -> list[SourceCrops]:
        """Parts of `size` crops; the last may be smaller."""
        parts = zip(*(x.split(size) for x in (self.source, self.tops, self.lefts)), strict=True)
        return [replace(self, source=s, tops=t, lefts=x) for s, t, x in parts]


def source_crops(arguments: FoldedConv, dtype: torch.dtype) -> SourceCrops:
    """The crops that `arguments` describe, in arithmetic of `dtype`."""
    images, indices, offsets, flips, colors, weight, _, resize, crop, mean, std, stride, padding, _ = (
        arguments
    )
    height, width = images.shape[1:3]
    rows = axis(height, resize, crop, weight.shape[2], stride, padding)
    columns = axis(width, resize, crop, weight.shape[3], stride, padding)
    y, x = (torch.from_numpy(each.pixels).to(images.device) for each in (rows, columns))
    x = torch.where(flips[:, None], width - 1 - x, x)
    pixels = images[indices[:, None, None], y[:, None], x[:, None, :]]
    shift, scale = (torch.tensor(values, dtype=dtype, device=images.device) for values in (mean, std))
    if colors is not None:
        # Enlarging the shifted image shifts the enlarged one: the weights of a pixel sum to 1. The zeros that
        # pad a crop are weights of zero (`Axis.mixing`), which no shift changes.
        shift = shift - colors.to(dtype)[:, None, None, :]
    source = (pixels.to(dtype) / 255 - shift) / scale
    tops, lefts = offsets.long().unbind(1)
    return SourceCrops(source, tops, torch.where(flips, resize - crop - lefts, lefts), rows, columns)


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


def _windows(batch: SourceCrops) -> Iterator[tuple[int, int, tuple[Tensor, ...], Tensor]]:
    """For each pair of phases: p, q, its outputs (image, row, column), and the source pixels of each output.

    The pixels are (outputs, taps, taps, 3).
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


def folded_conv2d(batch: SourceCrops, kernels: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The operator's definition, for the kernels of `fold`: (B, out channels, H, W), channels-last.

    The arithmetic is in the kernels' dtype.
    """
    out = empty_output(batch, kernels, dtype)
    pixels = out.permute(0, 2, 3, 1)
    for p, q, places, window in _windows(batch):
        pixels[places] = (torch.einsum("mstc,stco->mo", window, kernels[p, :, q]) + bias).to(dtype)
    return out


def folded_conv2d_backward(grad: Tensor, batch: SourceCrops) -> tuple[Tensor, Tensor]:
    """The gradients of the kernels (for `unfold`) and the bias, in the source's dtype, from the result's."""
    d_kernels = zero_kernels(batch, grad.shape[1])
    pixels = grad.permute(0, 2, 3, 1).to(d_kernels.dtype)
    for p, q, places, window in _windows(batch):
        d_kernels[p, :, q] = torch.einsum("mstc,mo->stco", window, pixels[places])
    return d_kernels, pixels.sum((0, 1, 2))


def zero_kernels(batch: SourceCrops, channels: int) -> Tensor:
    """Zeros to which the kernels' gradients are added: the shape of `fold`, in the source's dtype."""
    (row_phases, _, row_taps), (column_phases, _, column_taps) = (
        each.mixing.shape for each in (batch.rows, batch.columns)
    )
    return batch.source.new_zeros((row_phases, row_taps, column_phases, column_taps, 3, channels))


def empty_output(batch: SourceCrops, kernels: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised result."""
    height, width = batch.rows.phase.shape[1], batch.columns.phase.shape[1]
    return torch.empty(
        (len(batch.tops), kernels.shape[-1], height, width),
        dtype=dtype,
        device=kernels.device,
        memory_format=torch.channels_last,
    )
