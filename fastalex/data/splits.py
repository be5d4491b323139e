"""Splitting labelled images into training images and held-out images, and checking their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastalex.data.imageset import ImageSet
from fastalex.errors import DataError

TEST_FRACTION = 0.2  # the test set's fraction of a data set that has none of its own


def check_counts(images: ImageSet, uses: Sequence[str], *, classes: Sequence[str], what: str) -> None:
    """Check that each class has an image for each part that the images are to be split into.

    Args:
        images: the images to split.
        uses: what each part is for, for the error message: ``for training``.
        classes: names of the classes, in the order of the labels.
        what: the configuration key and value to name in an error message.

    Raises:
        DataError: naming the class with the fewest images.
    """
    counts = np.bincount(images.labels, minlength=len(classes))
    if counts.min() < len(uses):
        label = int(counts.argmin())
        count = f"{counts[label]} image{'s' if counts[label] != 1 else ''}"
        *first, last = (f"one {use}" for use in uses)
        raise DataError(
            f"{what}: class {classes[label]!r} has {count} to split; each class needs at least "
            f"{', '.join(first)} and {last}: add images of it, or remove the class"
        )


def split(
    images: ImageSet,
    fraction: float,
    seed: int,
    *,
    classes: Sequence[str],
    what: str,
    use: str = "for validation",
    key: str | None = "data.validation_fraction",
) -> tuple[ImageSet, ImageSet]:
    """Hold out a fraction of the images, stratified by class.

    Args:
        images: the images to split.
        fraction: the fraction to hold out, between 0 and 1; the number of images is rounded up.
        seed: decides which images; the same seed always holds out the same ones.
        classes: names of the classes, in the order of the labels.
        what: the configuration key and value to name in an error message.
        use: what the held-out images are for, for an error message.
        key: the configuration key that changes the fraction, for an error message; None if there is none.

    Returns:
        The remaining images and the held-out ones, each in their original order.

    Raises:
        DataError: a class has fewer than two images, or one of the two parts would have fewer images than
            there are classes, or none of some class.
    """
    check_counts(images, ("for training", use), classes=classes, what=what)
    from sklearn.model_selection import train_test_split  # takes a second to import

    held_out = int(np.ceil(fraction * len(images)))  # as train_test_split rounds
    sizes = {"for training": len(images) - held_out, use: held_out}
    change = f", or change {key}" if key else ""
    if min(sizes.values()) < len(classes):
        parts = " and ".join(f"{size} {part}" for part, size in sizes.items())
        raise DataError(
            f"{what}: {len(images)} images cannot be split into {parts} with all {len(classes)} classes in "
            f"both; add images{change}"
        )
    kept, held = train_test_split(
        np.arange(len(images)), test_size=held_out, stratify=images.labels, random_state=seed % 2**32
    )
    for (part, size), chosen in zip(sizes.items(), (kept, held), strict=True):
        missing = np.setdiff1d(np.arange(len(classes)), images.labels[chosen])
        if len(missing):
            count = np.count_nonzero(images.labels == missing[0])
            raise DataError(
                f"{what}: class {classes[missing[0]]!r} has {count} of the {len(images)} images to split, in "
                f"proportion too few for one of the {size} {part}; add images of it, or remove the "
                f"class{change}"
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
