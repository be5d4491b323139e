"""Resize, crop, flip, shift the colour and normalise in plain PyTorch: the readable definition.

The resize is PyTorch's own, the one that torchvision calls: bilinear, pixel centres at half-integers, with
`antialias=True`. On each axis that filter weighs source pixel j for output pixel i by a triangle

    max(0, 1 - |(j + 1/2) / s - (i + 1/2)| / max(1, 1 / s)),   s = output size / source size,

divided by the sum of the weights; when enlarging it is plain bilinear interpolation. The fast implementations
use the same triangle in whole numbers, max(0, T - |(2j + 1) R - (2i + 1) S|) with S the source size, R the
resized one and T = 2 max(S, R), so that their coordinates are exact whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Frame(NamedTuple):
    """The size of a resized image, and the place in it of the square that crops are cut from; in pixels."""

    height: int
    width: int
    top: int
    left: int


def frame(height: int, width: int, resize: int, keep_shape: bool) -> Frame:
    """The frame of an image of `height` x `width` pixels; its square has `resize` pixels on each side.

    With `keep_shape` it is that of torchvision's `Resize(resize)` and `CenterCrop(resize)`: the shorter side
    becomes `resize`, the longer side is rounded down, and half a pixel in the square's place to even.
    Without, the whole image becomes the square.
    """
    if not keep_shape:
        return Frame(resize, resize, 0, 0)
    shorter = min(height, width)
    height, width = resize * height // shorter, resize * width // shorter
    return Frame(height, width, round((height - resize) / 2), round((width - resize) / 2))


def augment(
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
    dtype: torch.dtype,
) -> Tensor:
    """The operator's definition; arguments and result as for `fastalex.kernels.augment`.

    With views = V > 1 there are V outputs for each index, next to each other, and the V rows of `offsets` and
    `flips` apply to every image; with V = 1 they have one row for each index. `colors` always has one.
    """
    count = len(indices) * views
    out = empty_batch(count, crop, dtype, images.device)
    if count == 0:
        return out
    if views > 1:
        offsets, flips = offsets.repeat(len(indices), 1), flips.repeat(len(indices))
    source = images[indices].movedim(-1, 1).float()
    height, width, top, left = frame(images.shape[1], images.shape[2], resize, keep_shape)
    resized = F.interpolate(source, size=(height, width), mode="bilinear", antialias=True)

    step = torch.arange(crop, device=images.device)
    rows = offsets[:, 0, None] + top + step
    columns = offsets[:, 1, None] + left + torch.where(flips[:, None], crop - 1 - step, step)
    image = torch.arange(count, device=images.device) // views
    channel = torch.arange(3, device=images.device)
    crops = resized[
        image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]
    shift, scale = (crops.new_tensor(values)[:, None, None] for values in (mean, std))
    if colors is not None:
        shift = shift - colors.repeat_interleave(views, 0)[:, :, None, None]
    return out.copy_((crops / 255 - shift) / scale)


def empty_batch(count: int, crop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised result of `augment`: (count, 3, crop, crop), channels-last."""
    return torch.empty((count, 3, crop, crop), dtype=dtype, device=device, memory_format=torch.channels_last)
