"""Decoding of image files to RGB pixels, the same for every loader and data set.

=========================  ==========================================================================
in the file                in the result, always uint8 (H, W, 3)
=========================  ==========================================================================
grey (L, 1-bit)            the value in all three channels
palette                    the palette's colours
alpha (RGBA, LA, palette)  dropped, not composited: the colour stored under a transparent pixel counts
CMYK, YCCK, LAB, YCbCr     Pillow's ``convert("RGB")``: no colour profile is applied
16 bits a channel          the high byte, as libpng and Pillow reduce 48-bit RGB; of a PPM, rounded
32-bit integer or float    refused: there is no standard range of such values
EXIF orientation           applied, or else that of XMP; an unreadable EXIF block counts as upright
several frames             the first
any size from 1 x 1        unchanged; over 179 million pixels are refused (Pillow's decompression-bomb limit)
=========================  ==========================================================================

Pillow decodes, limited to the formats in ``FORMATS`` (its EPS reader would start Ghostscript). A file is
*damaged* if Pillow does not recognise it or if its data are truncated. Wrong bytes in the middle of a JPEG
are not an error for libjpeg, and so not here.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from fastalex.errors import DataError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")

_Transpose = Image.Transpose
_UPRIGHT = {  # EXIF 2.3, tag 0x0112: the transposition that makes each orientation upright
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}


class DamagedImageError(DataError):
    """A file is not an image, is truncated, or is of a kind that is refused.

    Args:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(
            f"{path} is not a whole image ({reason}); replace or remove it, or set data.on_error=skip"
        )
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # workers pickle it
        return type(self), (self.path, self.reason)


def decode_image(path: Path | str) -> NDArray[np.uint8]:
    """Decode a file into uint8 (H, W, 3).

    Args:
        path: the file.

    Raises:
        DamagedImageError: the file is truncated, not an image, or of a kind that is refused.
        DataError: the file does not exist or is not readable.
    """
    return _decode(path, draft=False)[0]


def check_image(path: Path | str) -> tuple[int, int]:
    """Read a whole file and return its height and width, in pixels.

    A JPEG is decoded at an eighth of its size, which reads every byte but takes less time.

    Args:
        path: the file.

    Raises:
        DamagedImageError, DataError: as :func:`decode_image`.
    """
    return _decode(path, draft=True)[1]


def is_image(path: Path) -> bool:
    """Whether a file has the name of an image or, whatever its name, the first bytes of one.

    Args:
        path: the file, which may be damaged.
    """
    if path.suffix.lower() in image_extensions():
        return True
    try:
        with Image.open(path, formats=_formats()):
            return True
    except Exception:  # as in _decode: Pillow's readers raise many types
        return False


def is_dangling(path: Path | str) -> bool:
    """Whether a path is a link to a file that does not exist."""
    return os.path.islink(path) and not os.path.exists(path)  # noqa: PTH110, PTH114


def _decode(path: Path | str, *, draft: bool) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Return the pixels, at a reduced size if ``draft``, and the full height and width."""
    try:
        with Image.open(path, formats=_formats()) as image:
            full = image.size
            if draft:
                image.draft(None, (1, 1))  # has no effect for formats other than JPEG
            reduced = image.size != full
            image.load()
            orientation = _orientation(image)
            pixels = _to_rgb(image if orientation == 1 else image.transpose(_UPRIGHT[orientation]))
            width, height = full[::-1] if orientation >= 5 else full
            return pixels, (height, width) if reduced else (pixels.shape[0], pixels.shape[1])
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many types: struct.error, SyntaxError, ...
        if is_dangling(path):
            raise DamagedImageError(path, "a link to a file that does not exist") from None
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DamagedImageError(path, reason or type(error).__name__) from None


def _orientation(image: Image.Image) -> int:
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not mean damaged pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    is_16_bit_pgm = image.format == "PPM" and image.mode == "I"  # Pillow has scaled its values to 0..65535
    if image.mode.startswith("I;16") or is_16_bit_pgm:  # convert() would clip instead of scaling
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"{'integer' if image.mode == 'I' else 'float'} pixels of 32 bits")
    image.info.pop("transparency", None)  # dropped as alpha is; convert() would warn about it
    return np.array(image.convert("RGB"))


@cache
def image_extensions() -> tuple[str, ...]:
    """Return the extensions, in small letters, of names that make a file an image."""
    formats = _formats()
    return tuple(end for end, name in Image.registered_extensions().items() if name in formats)


@cache
def _formats() -> list[str]:
    """Return the formats in ``FORMATS`` that this build of Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
