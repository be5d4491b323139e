"""Generated images, for machines without the data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastalex.data.cifar import CLASSES


def generate(root: Path, train: int = 256, test: int = 32) -> Path:
    """Write noise as JPEG files in CIFAR-10's classes: `train` and `test` images per class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:04}.jpg")
    return root
