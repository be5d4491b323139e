"""Where a network errs: figures of each class, and the pairs of classes it confuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class on a split.

    Attributes:
        name: of the class.
        images: number of images of the class.
        precision: fraction of the images predicted as the class that are of it; None if there are none.
        recall: fraction of the class's images that are predicted as it; None, as the errors, without images.
        top1_error: 1 - recall.
        top5_error: fraction of the class's images of which it is not among the five most probable classes.
    """

    name: str
    images: int
    precision: float | None
    recall: float | None
    top1_error: float | None
    top5_error: float | None


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another.

    Attributes:
        actual: number of the images' class.
        predicted: number of the class that was predicted.
        count: number of images.
        share: of the images of the actual class.
    """

    actual: int
    predicted: int
    count: int
    share: float


def confusion_counts(probabilities: Tensor, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often class i (row) was predicted as class j (column), int64 ``(classes, classes)``.

    Args:
        probabilities: of the classes, fp32 ``(N, classes)``, on the CPU.
        labels: int64 ``(N,)``.
    """
    from sklearn.metrics import confusion_matrix  # takes a second to import

    predicted = probabilities.argmax(dim=1).numpy()
    counts: NDArray[np.int64] = confusion_matrix(labels, predicted, labels=range(probabilities.shape[1]))
    return counts


def class_figures(
    probabilities: Tensor, labels: NDArray[np.int64], classes: Sequence[str]
) -> list[ClassFigures]:
    """Return the figures of each class, in the order of the classes.

    Args:
        probabilities: of the classes, fp32 ``(N, classes)``, on the CPU.
        labels: int64 ``(N,)``.
        classes: their names.
    """
    from sklearn.metrics import precision_recall_fscore_support

    predicted = probabilities.argmax(dim=1).numpy()
    top5 = probabilities.topk(min(5, len(classes)), dim=1).indices.numpy()
    in_top5 = (top5 == labels[:, None]).any(axis=1) | (predicted == labels)  # topk may break ties otherwise
    precision, recall, _, images = precision_recall_fscore_support(
        labels, predicted, labels=range(len(classes)), zero_division=np.nan
    )
    found = np.bincount(labels, weights=in_top5, minlength=len(classes))
    return [
        ClassFigures(
            name,
            int(images[i]),
            None if np.isnan(precision[i]) else float(precision[i]),
            float(recall[i]) if images[i] else None,
            1 - float(recall[i]) if images[i] else None,
            1 - float(found[i]) / int(images[i]) if images[i] else None,
        )
        for i, name in enumerate(classes)
    ]


def most_confused(counts: NDArray[np.int64], limit: int) -> list[Confusion]:
    """Return the pairs of classes with the most confused images, the most first, at most ``limit``.

    Among equal counts, the pair with the larger share of its class is first, then the order of the classes.

    Args:
        counts: as :func:`confusion_counts` returns them.
        limit: number of pairs.
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    shares = wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = np.nonzero(wrong)
    order = np.lexsort((-shares[rows, columns], -wrong[rows, columns]))[:limit]
    return [
        Confusion(int(i), int(j), int(wrong[i, j]), float(shares[i, j]))
        for i, j in zip(rows[order], columns[order], strict=True)
    ]


def confused_classes(counts: NDArray[np.int64], limit: int) -> list[int]:
    """Return the classes of the most confused pairs, those of a pair near each other, at most ``limit``.

    Args:
        counts: as :func:`confusion_counts` returns them.
        limit: number of classes.
    """
    chosen: dict[int, None] = {}
    for pair in most_confused(counts, counts.size):
        missing = [each for each in (pair.actual, pair.predicted) if each not in chosen]
        if len(chosen) + len(missing) > limit:
            break
        chosen |= dict.fromkeys(missing)
    return list(chosen)
