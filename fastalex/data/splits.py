"""Splitting labelled images into training images and held-out images, and checking their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastalex.data.imageset import ImageSet
from fastalex.errors import DataError

TEST_FRACTION = 0.2  # the test set's fraction of a data set that has none of its own


def split(
    images: ImageSet, fraction: float, seed: int, *, classes: Sequence[str], what: str
) -> tuple[ImageSet, ImageSet]:
    """Hold out a fraction of the images, stratified by class.

    Args:
        images: the images to split.
        fraction: the fraction to hold out, between 0 and 1; the number of images is rounded up.
        seed: decides which images; the same seed always holds out the same ones.
        classes: names of the classes, in the order of the labels.
        what: the configuration key and value to name in an error message.

    Returns:
        The remaining images and the held-out ones, each in their original order.

    Raises:
        DataError: a class has fewer than two images, or one of the two parts would have fewer images than
            there are classes, or none of some class.
    """
    counts = np.bincount(images.labels, minlength=len(classes))
    if counts.min() < 2:
        scarce = int(counts.argmin())
        raise DataError(
            f"{what}: class {classes[scarce]!r} has {counts[scarce]} images left to split; "
            "each class needs at least two, so add images or remove the class"
        )
    from sklearn.model_selection import train_test_split  # takes a second to import

    held_out = int(np.ceil(fraction * len(images)))  # as train_test_split rounds
    if min(held_out, len(images) - held_out) < len(classes):
        raise DataError(
            f"{what}: {len(images)} images cannot be split into {len(images) - held_out} and {held_out} "
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
    """Check that every label is one of 0..num_classes - 1.

    Args:
        labels: int64 (N,).
        num_classes: number of classes.
        what: the configuration key and value to name in an error message.

    Raises:
        DataError: naming the first label that is out of range.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{what}: image {wrong[0]} has label {labels[wrong[0]]}, but there are {num_classes} classes; "
            f"labels go from 0 to {num_classes - 1}"
        )
