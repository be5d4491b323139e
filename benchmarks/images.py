"""Images where there is no data set: what a benchmark reads has to be there, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastalex.data.cifar import CLASSES


def generate(root: Path, train: int = 256, test: int = 32) -> Path:
    """A tree like CIFAR-10's as JPEG files: so many images of noise to a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:04}.jpg")
    return root
