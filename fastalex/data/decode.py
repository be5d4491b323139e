"""From an image file to RGB pixels: one policy for every loader and data set.

=========================  ============================================================================
what the file holds        what comes out, always uint8 (H, W, 3)
=========================  ============================================================================
grey (L, 1-bit)            the value in all three channels
palette                    the palette's colours
alpha (RGBA, LA, palette)  dropped, not composited: the colour stored under a transparent pixel counts
CMYK, YCCK, LAB, YCbCr     Pillow's ``convert("RGB")``: no colour profile is applied
16 bits a channel          the high byte, as libpng and Pillow reduce 48-bit RGB
32-bit integer or float    refused: no range of such values is agreed on
EXIF orientation           applied; an unreadable EXIF block counts as "upright"
several frames             the first
any size from 1 x 1        as it is; over 179 million pixels is refused (Pillow's decompression-bomb limit)
=========================  ============================================================================

Pillow does the work. A file is *damaged* when Pillow does not recognise it, or when its data end before the
picture does. Wrong bytes in the middle of a JPEG are no error to libjpeg, hence none here.
"""

from __future__ import annotations


import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastalex.errors import DataError


class DamagedImageError(DataError):
    """A file is not an image, or only the beginning of one."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(
            f"{path} is not a whole image ({reason}); replace or remove it, or set data.on_error=skip"
        )
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


def decode_image(path: Path | str) -> NDArray[np.uint8]:
    """Decodes a file into uint8 (H, W, 3).

    Raises:
        DamagedImageError: the file is truncated, not an image, or of a kind refused above.
        DataError: the operating system does not let us read it.
    """
    raise NotImplementedError
