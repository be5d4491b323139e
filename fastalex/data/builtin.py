"""Data sets that need no files. The arguments are those of :func:`fastalex.data.datasets.load_splits`."""

from __future__ import annotations

import numpy as np

from fastalex.config import DataConfig
from fastalex.data.imageset import DataSplits, ImageSet
from fastalex.data.splits import TEST_FRACTION, split
from fastalex.errors import ConfigError


def load_digits(config: DataConfig, seed: int, *, progress: bool) -> DataSplits:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8, their 17 grey levels scaled to 0..255.

    A fifth of them, the same for every seed, is the test set.
    """
    from sklearn.datasets import load_digits as sklearn_digits  # takes half a second to import

    digits = sklearn_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = ImageSet(digits.target.astype(np.int64), pixels=np.repeat(grey[..., None], 3, axis=3))
    classes = tuple(str(digit) for digit in range(10))
    what = f"data.validation_fraction={config.validation_fraction}"
    train, test = split(images, TEST_FRACTION, 0, classes=classes, what=what)
    train, validation = split(train, config.validation_fraction, seed, classes=classes, what=what)
    return DataSplits(train, validation, test, classes, source="scikit-learn's digits")


def load_synthetic(config: DataConfig, seed: int, *, progress: bool) -> DataSplits:
    """Return ``data.images`` images of noise, resize x resize, the same for every seed; for throughput only.

    All of them are training images. Validation and test images are the first eighth of the same images:
    errors on them mean nothing.
    """
    rng = np.random.default_rng(0)
    shape = (config.images, config.resize, config.resize, 3)
    try:
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    except MemoryError as error:
        raise ConfigError(
            f"data.images={config.images}: so many images of data.resize={config.resize} do not fit memory"
        ) from error
    images = ImageSet(np.arange(config.images, dtype=np.int64) % config.classes, pixels=pixels)
    held_out = images.select(np.arange(-(-config.images // 8)))
    classes = tuple(str(label) for label in range(config.classes))
    return DataSplits(images, held_out, held_out, classes, is_measurable=False, source="synthetic noise")
