"""From an image of any shape to the square that crops are cut from (``data.fit``), with torchvision."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2.functional import resize

from fastalex.config import Fit
from fastalex.kernels.augment_reference import frame


def fitted(image: Tensor, size: int, fit: Fit) -> Tensor:
    """Resize an image to a square, with torchvision's bilinear resize and ``antialias=True``.

    With ``Fit.shorter_side`` the result is that of ``Resize(size)`` and ``CenterCrop(size)``, in uint8 to one
    level. The longer side is resized and cut before the other is resized, so that a long, thin image takes
    little memory.

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
            image = resize(image, [height, resized.width], antialias=True)
            image = image[:, :, resized.left : resized.left + size]
        else:
            image = resize(image, [resized.height, width], antialias=True)
            image = image[:, resized.top : resized.top + size]
    return resize(image, [size, size], antialias=True)
