"""Labelled images, either decoded or still in their files, and the three splits of a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastalex.data.decode import decode_image


@dataclass(frozen=True)
class ImageSet:
    """One split: N labelled images. Exactly one of ``pixels`` and ``paths`` is set.

    Attributes:
        labels: int64 (N,), the class of each image.
        pixels: uint8 (N, H, W, 3), the decoded images, which all have one small size; None for files.
        paths: the N files, of any sizes, decoded when they are needed; None for decoded images.

    Raises:
        ValueError: if both or neither are set, or if there is not one label per image.
    """

    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None = None
    paths: tuple[Path | str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.pixels is None) == (self.paths is None):
            raise ValueError("an ImageSet has either pixels or paths")
        images = self.paths if self.pixels is None else self.pixels
        assert images is not None
        if len(images) != len(self.labels):
            raise ValueError(
                f"an ImageSet needs a label for each image, got {len(self.labels)} for {len(images)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> NDArray[np.uint8]:
        """Return image i, uint8 (H, W, 3).

        Raises:
            DataError: its file, which is named, cannot be decoded.
        """
        if self.pixels is not None:
            return self.pixels[i]
        assert self.paths is not None
        return decode_image(self.paths[i])

    def select(self, indices: NDArray[np.int64]) -> ImageSet:
        """Return the images at the given indices, int64 (n,), in this order; pixels are copied."""
        if self.pixels is not None:
            return ImageSet(self.labels[indices], pixels=self.pixels[indices])
        assert self.paths is not None
        return ImageSet(self.labels[indices], paths=tuple(self.paths[i] for i in indices))

    def _identity(self) -> bytes:
        """What tells these images from others: their labels and, of files, their names.

        Not pixels, which two versions of a decoder may round differently.
        """
        names = list(map(str, self.paths or ()))
        folder = len(os.path.commonpath([min(names), max(names)])) if names else 0
        return self.labels.tobytes() + "\0".join(name[folder:] for name in names).encode(errors="replace")


@dataclass(frozen=True)
class DataSplits:
    """A data set split into images for training, for validation (choosing a model) and for testing it.

    Attributes:
        train: training images.
        validation: validation images.
        test: test images.
        classes: names of the classes, in the order of the labels.
        skipped: number of damaged files that ``data.on_error=skip`` left out.
        is_measurable: whether error rates on the data mean anything; False for synthetic data.
        source: what the images are and where they were found, as a run reports it; empty for the default,
            ``data.name`` and ``data.root``.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    skipped: int = 0
    is_measurable: bool = True
    source: str = ""

    @cached_property
    def digest(self) -> str:
        """A hash by which a run notices that its images are others, or are split in another way.

        It does not depend on the folder that they are in.
        """
        digest = blake2b(digest_size=16)
        for images in (self.train, self.validation, self.test):
            digest.update(blake2b(images._identity()).digest())
        return digest.hexdigest()
