"""From an image of any shape to the square that crops are cut from (``data.fit``), with torchvision."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from fastalex.config import Fit
from fastalex.kernels.augment_reference import frame


def fitted(image: Tensor, size: int, fit: Fit) -> Tensor:
    """Resize an image to a square, with torchvision's bilinear resize and ``antialias=True``.

    With ``Fit.shorter_side`` the result is that of ``Resize(size)`` and ``CenterCrop(size)``, in uint8 to one
    level. The longer side is cut before it is enlarged, and before the other is resized, so that a long, thin
    image takes little memory.

    Args:
        image: uint8 or float (3, H, W), upright: its EXIF orientation has been applied.
        size: side of the square, in pixels.
        fit: what becomes of an image that is not square.

    Returns:
        (3, size, size), of the image's dtype.
    """
    height, width = image.shape[1:]
    if fit is Fit.shorter_side and height != width:
        resized = frame(height, width, size, keep_shape=True)
        if height < width:
            image = _part(image, 2, resized.width, resized.left, size)
        else:
            image = _part(image, 1, resized.height, resized.top, size)
    return resize(image, [size, size], antialias=True)


def _part(image: Tensor, axis: int, resized: int, start: int, count: int) -> Tensor:
    """Resize one axis of an image to ``resized`` pixels; return ``count`` of them, from ``start`` on."""
    length = image.shape[axis]
    if resized <= length:
        shape = [*image.shape[1:]]
        shape[axis - 1] = resized
        return resize(image, shape, antialias=True).narrow(axis, start, count)
    # An enlarged axis may be thousands of times as long. Its pixels lie between two of the image's each.
    places = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * length / resized - 0.5
    places = places.clamp(0, length - 1)
    before = places.long()
    after = (before + 1).clamp(max=length - 1)
    pixels = image if image.is_floating_point() else image.float()
    weight = (places - before).to(pixels.dtype).unflatten(0, (-1, *[1] * (2 - axis)))
    values = torch.lerp(pixels.index_select(axis, before), pixels.index_select(axis, after), weight)
    return values if image.is_floating_point() else values.round().to(image.dtype)
