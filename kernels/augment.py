"""From uint8 images to a normalised batch as one PyTorch operator: checks and dispatch by device.

`fastalex::augment` resizes, crops, flips, shifts colours, normalises, converts and lays out a batch in one
pass over the output. `augment_numba` computes it on the CPU, `augment_triton` on CUDA, and
`augment_reference`, plain PyTorch, on any other device; the fast modules are imported by the first call that
needs them. Ten-crop is the same operator with ten views of each image instead of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema

from . import augment_reference as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def augment(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    indices: Tensor | None = None,
    keep_shape: bool = False,
    colors: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A normalised batch of crops of uint8 images.

    Each image is resized to `resize` x `resize` pixels as `torchvision.transforms.v2.Resize` does with
    `antialias=True`, in float arithmetic, larger or smaller; then cropped; then mirrored left to right where
    `flips` is True. The result is (x / 255 + color - mean) / std, rounded to `dtype` (to nearest even).

    Args:
        images: uint8 (N, H, W, 3), contiguous.
        offsets: int32 (B, 2), top and left of each crop within the resized square, 0 .. resize - crop.
        flips: bool (B,), which crops are mirrored.
        resize: pixels of the resized square on each axis.
        crop: pixels of a crop on each axis, at most `resize`.
        mean: three numbers, one per channel, for pixels in 0..1.
        std: three positive numbers, as `mean`.
        dtype: of the result: float32, bfloat16 or float16.
        indices: int64 (B,), the image of each crop, so that a batch is gathered from a resident data set
            without copying images. None: image i for crop i (and N = B).
        keep_shape: False: the whole image becomes the square, whatever its shape. True: the shorter side is
            resized to `resize`, and the square is the centre of the result (`augment_reference.frame`).
        colors: float32 (B, 3), what is added to every pixel of a crop, in units of pixels in 0..1. None: 0.
        out: where to write the result, a tensor as it would be returned. Not in compiled code.

    Returns:
        (B, 3, crop, crop) in `dtype`, channels-last; `out`, if it was given.

    Raises:
        ValueError: a wrong shape, dtype or device; a crop larger than the resized image; on the CPU an index
            or an offset out of range. On a GPU that last check would make the host wait, so there such a crop
            is filled with NaN instead (and nothing outside `images` is read).
    """
    name = "augment"
    _check_images(images, resize, crop, mean, std, dtype, name, keep_shape)
    indices = _resolve_indices(images, indices, name)
    _check_plan(images, indices, offsets, flips, colors, name)
    options = 1, resize, keep_shape, crop, list(mean), list(std)
    tensors = images, indices, offsets, flips, colors
    if out is None:
        return _augment(*tensors, *options, dtype)
    _check_out(out, (len(indices), 3, crop, crop), dtype, images.device)
    _write(out, *tensors, *options)
    return out


def ten_crop(
    images: Tensor,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    indices: Tensor | None = None,
    mirror: bool = True,
    keep_shape: bool = False,
) -> Tensor:
    """The corner and centre crops of each image and their mirror images, in one launch.

    Args:
        images: uint8 (N, H, W, 3), contiguous.
        resize: pixels of the resized square on each axis.
        crop: pixels of a crop on each axis, at most `resize`.
        mean: three numbers, one per channel, for pixels in 0..1.
        std: three positive numbers, as `mean`.
        dtype: of the result: float32, bfloat16 or float16.
        indices: int64 (B,), which images. None: all of them, in order (and N = B).
        mirror: False leaves the mirror images out: five views instead of ten.
        keep_shape: as `augment`; the corners are those of the square.

    Returns:
        (B * 10, 3, crop, crop) or (B * 5, 3, crop, crop) in `dtype`, channels-last: the views of the first
        image, then of the second, and so on, in the order of `torchvision.transforms.v2.TenCrop` (or
        `FiveCrop`).

    Raises:
        ValueError: as `augment`.
    """
    _check_images(images, resize, crop, mean, std, dtype, "ten_crop", keep_shape)
    indices = _resolve_indices(images, indices, "ten_crop")
    # When tracing, do without the cache: dynamo warns of it, and the tensors that other tracers substitute
    # (as they do for the images) must not stay in it.
    traced = torch.compiler.is_compiling() or type(images) is not Tensor
    views = ten_crop_views.__wrapped__ if traced else ten_crop_views
    offsets, flips = views(resize, crop, mirror, images.device)
    options = resize, keep_shape, crop, list(mean), list(std), dtype
    return _augment(images, indices, offsets, flips, None, len(flips), *options)


def _check_images(
    images: Tensor,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    name: str,
    keep_shape: bool = False,
) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{name}: images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}"
        )
    if not images.is_contiguous():
        raise ValueError(f"{name}: images must be contiguous, got strides {images.stride()}")
    if images.shape[1] == 0 or images.shape[2] == 0:
        raise ValueError(f"{name}: images must have at least one pixel, got {tuple(images.shape)}")
    if not 1 <= crop <= resize:
        raise ValueError(f"{name}: crop must be in 1 .. resize, got crop={crop} with resize={resize}")
    frame = reference.frame(images.shape[1], images.shape[2], resize, keep_shape)
    if max(images.shape[1] * frame.height, images.shape[2] * frame.width) >= 2**28:
        # The kernels' exact coordinates are 32-bit.
        raise ValueError(f"{name}: images of {tuple(images.shape[1:3])} resized to {resize} are too large")
    if (
        3 * max(images.shape[1] * images.shape[2], crop**2) >= 2**31
    ):  # and so are their offsets within an image
        raise ValueError(f"{name}: images of {tuple(images.shape[1:3])}, or crops of {crop}, are too large")
    if len(mean) != 3 or not all(-math.inf < value < math.inf for value in mean):
        raise ValueError(f"{name}: mean must be three finite numbers, got {mean}")
    if len(std) != 3 or not all(0 < value < math.inf for value in std):
        raise ValueError(f"{name}: std must be three positive numbers, got {std}")
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: dtype must be float32, bfloat16 or float16, got {dtype}")


def _resolve_indices(images: Tensor, indices: Tensor | None, name: str) -> Tensor:
    if indices is None:
        return torch.arange(len(images), device=images.device)
    if indices.dtype != torch.int64 or indices.dim() != 1 or indices.device != images.device:
        raise ValueError(
            f"{name}: indices must be int64 (B,) on {images.device}, "
            f"got {indices.dtype} {tuple(indices.shape)} on {indices.device}"
        )
    if len(images) == 0 and len(indices) > 0:
        raise ValueError(f"{name}: {len(indices)} indices into no images")
    return indices


def _check_plan(
    images: Tensor, indices: Tensor, offsets: Tensor, flips: Tensor, colors: Tensor | None, name: str
) -> None:
    count = len(indices)
    for argument, value, shape, kind in (
        ("offsets", offsets, (count, 2), torch.int32),
        ("flips", flips, (count,), torch.bool),
        ("colors", colors, (count, 3), torch.float32),
    ):
        if value is None:
            continue
        if value.shape != shape or value.dtype != kind or value.device != images.device:
            raise ValueError(
                f"{name}: {argument} must be {kind} {shape} on {images.device}, "
                f"got {value.dtype} {tuple(value.shape)} on {value.device}"
            )


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if out.shape != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"augment: out must be {dtype} {shape} on {device}, got {out.dtype} {tuple(out.shape)} "
            f"on {out.device}"
        )
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"augment: out must be channels-last, got strides {out.stride()}")


def _crop_views(resize: int, crop: int, mirror: bool) -> list[tuple[int, int, bool]]:
    """(top, left, flip) of each of the ten (or five) views, in torchvision's order."""
    far, middle = resize - crop, round((resize - crop) / 2)
    five = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    views = [(top, left, False) for top, left in five]
    if mirror:  # TenCrop mirrors the image before it crops, so the position of each crop is mirrored too
        views += [(top, far - left, True) for top, left in five]
    return views


@lru_cache(maxsize=16)  # without it, a GPU would wait for a copy from the host in every batch
def ten_crop_views(resize: int, crop: int, mirror: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The views of `ten_crop`: int32 (V, 2) offsets and bool (V,) flips, with V = 10 if `mirror`, else 5."""
    views = _crop_views(resize, crop, mirror)
    offsets = torch.tensor([view[:2] for view in views], dtype=torch.int32, device=device)
    return offsets, torch.tensor([view[2] for view in views], device=device)


def _check_ranges(images: Tensor, indices: Tensor, offsets: Tensor, limit: int, function: str) -> None:
    for name, values, last in (("indices", indices, len(images) - 1), ("offsets", offsets, limit)):
        if values.numel() == 0:
            continue
        low, high = (int(value) for value in values.aminmax())
        if low < 0 or high > last:
            raise ValueError(f"{function}: {name} must be in 0 .. {last}, got {low} .. {high}")


def _write(
    out: Tensor,
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    colors: Tensor | None,
    *options: Any,
) -> None:
    """Compute `out`; the rest are the arguments of `augment_reference.augment`, without its dtype."""
    if images.device.type == "cpu":
        from . import augment_numba

        _, resize, _, crop, *_ = options
        _check_ranges(images, indices, offsets, resize - crop, "augment")
        augment_numba.write(out, images, indices, offsets, flips, colors, *options)
    elif images.device.type == "cuda":
        from . import augment_triton

        augment_triton.write(out, images, indices, offsets, flips, colors, *options)
    else:
        options = *options, out.dtype
        out.copy_(reference.augment(images, indices, offsets, flips, colors, *options))


@custom_op("fastalex::augment", mutates_args=(), schema=infer_schema(reference.augment, mutates_args=()))
def _augment(
    images: Tensor, indices: Tensor, offsets: Tensor, flips: Tensor, colors: Tensor | None, *options: Any
) -> Tensor:
    views, _, _, crop, *_, dtype = options
    out = reference.empty_batch(len(indices) * views, crop, dtype, images.device)
    _write(out, images, indices, offsets, flips, colors, *options[:-1])
    return out


@_augment.register_fake
def _(
    images: Tensor, indices: Tensor, offsets: Tensor, flips: Tensor, colors: Tensor | None, *options: Any
) -> Tensor:
    views, _, _, crop, *_, dtype = options
    return reference.empty_batch(indices.shape[0] * views, crop, dtype, images.device)
