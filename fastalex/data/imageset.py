"""What a data set is once it is found on disk: labelled images, decoded or still in their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastalex.data.decode import decode_image


@dataclass(frozen=True)
class ImageSet:
    """One split: N labelled images, of which exactly one of ``pixels`` and ``paths`` is set.

    Attributes:
        labels: int64 (N,), the class of each image.
        pixels: uint8 (N, H, W, 3), where all images are of one small size and decoded; otherwise None.
        paths: the N files, of any mixture of sizes, to be decoded as they are needed; otherwise None.
    """

    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None = None
    paths: tuple[Path, ...] | None = None

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
        """The i-th image, uint8 (H, W, 3). Raises DataError, naming the file, where it cannot be decoded."""
        if self.pixels is not None:
            return self.pixels[i]
        assert self.paths is not None
        return decode_image(self.paths[i])

    def select(self, indices: NDArray[np.int64]) -> ImageSet:
        """The images at these indices, in this order; pixels are copied."""
        if self.pixels is not None:
            return ImageSet(self.labels[indices], pixels=self.pixels[indices])
        assert self.paths is not None
        return ImageSet(self.labels[indices], paths=tuple(self.paths[i] for i in indices))


@dataclass(frozen=True)
class DataSplits:
    """A data set divided into the images that train, those that choose and those that judge.

    Attributes:
        classes: the names, in the order of the labels.
        skipped: how many damaged files ``data.on_error=skip`` left out.
        is_measurable: whether an error figure on this data means anything; False for synthetic data.
        source: what the images are and where they were found, as a run reports it.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    skipped: int = 0
    is_measurable: bool = True
    source: str = ""
