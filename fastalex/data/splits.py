"""Dividing labelled images into those that train and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from fastalex.data.imageset import ImageSet
from fastalex.errors import DataError

TEST_FRACTION = 0.2  # of a data set without a test set of its own


def divide(
    images: ImageSet, fraction: float, seed: int, *, classes: Sequence[str], what: str
) -> tuple[ImageSet, ImageSet]:
    """Holds out a fraction of the images, in proportion from each class: (the rest, the held out).

    Args:
        seed: decides which; the same seed always holds out the same images.
        what: names the data set and the split in an error message.

    Raises:
        DataError: a class has fewer than the two images that it takes, or a part would have fewer images
            than there are classes, or none of a class.
    """
    counts = np.bincount(images.labels, minlength=len(classes))
    if counts.min() < 2:
        scarce = int(counts.argmin())
        raise DataError(
            f"{what}: class {classes[scarce]!r} has {counts[scarce]} images left to divide; "
            "each class needs at least two, so add images or remove the class"
        )
    held_out = int(np.ceil(fraction * len(images)))  # as train_test_split rounds
    if min(held_out, len(images) - held_out) < len(classes):
        raise DataError(
            f"{what}: {len(images)} images cannot be divided into {len(images) - held_out} and {held_out} "
            f"with all {len(classes)} classes in both; add images or change the fraction"
        )
    kept, held = train_test_split(
        np.arange(len(images)), test_size=held_out, stratify=images.labels, random_state=seed % 2**32
    )
    for part in (kept, held):
        found = np.bincount(images.labels[part], minlength=len(classes))
        if found.min() == 0:
            scarce = int(found.argmin())
            raise DataError(
                f"{what}: class {classes[scarce]!r} has {counts[scarce]} images, too few for both parts, of "
                f"{len(kept)} and {len(held)}; add images of it or change the fraction"
            )
    return images.select(np.sort(kept)), images.select(np.sort(held))


def check_labels(labels: NDArray[np.int64], num_classes: int, *, what: str) -> None:
    """Raises DataError, with the first one, if a label is not one of 0..num_classes - 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{what}: image {wrong[0]} has label {labels[wrong[0]]}, and there are {num_classes} classes; "
            f"labels go from 0 to {num_classes - 1}"
        )
