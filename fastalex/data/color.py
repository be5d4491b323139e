"""The paper's second augmentation, ``data.color=pca``: shifts along the principal components of the colours.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012,
section 4.1: to each pixel of an image is added

    [p1, p2, p3] [a1 l1, a2 l2, a3 l3]^T

where p and l are the eigenvectors and eigenvalues of the 3 x 3 covariance matrix of the training images' RGB
values, and each a is drawn from N(0, 0.1) once for an image in an epoch (:mod:`fastalex.data.sampling`). An
eigenvalue is a variance, so the size of the shift depends on the unit of a pixel. Here pixels are in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastalex.config import Color, DataConfig
from fastalex.data.decode import decode_image
from fastalex.data.imageset import ImageSet
from fastalex.data.workers import map_unordered
from fastalex.runtime import available_cores

SAMPLE = 10_000  # files that are decoded, at most: evenly spaced over the training images
_CHUNK = 32  # files per task of a worker process
_DECODED_CHUNK = 1024  # decoded images at a time

_Matrix = NDArray[np.float64]


def components(
    data: DataConfig, images: ImageSet, *, progress: bool = False
) -> tuple[list[float], list[list[float]]]:
    """Return the values of ``color_eigenvalues`` and ``color_eigenvectors`` for a training.

    Args:
        data: with ``color=none``, or if it has the values already, they are returned as they are.
        images: the training images, from which they are computed otherwise.
        progress: show a progress bar while files are read.

    Raises:
        DataError: a file, which is named, cannot be decoded.
    """
    if data.color is not Color.pca or data.color_eigenvalues:
        return data.color_eigenvalues, data.color_eigenvectors
    values, vectors = principal_components(images, progress=progress)
    return values.tolist(), vectors.tolist()


def steps(data: DataConfig) -> list[list[float]]:
    """Return what is added to a pixel's RGB for a factor of 1 of each component: three rows, or none.

    Args:
        data: with its components (:func:`components`), if ``color=pca``.
    """
    if data.color is not Color.pca:
        return []
    rows: list[list[float]] = (
        np.array(data.color_eigenvalues)[:, None] * np.array(data.color_eigenvectors)
    ).tolist()
    return rows


def principal_components(images: ImageSet, *, progress: bool = False) -> tuple[_Matrix, _Matrix]:
    """Return the eigenvalues and eigenvectors of the covariance matrix of RGB values, with pixels in 0..1.

    Every image counts equally, whatever its size. Of files, at most :data:`SAMPLE` are read. The sums are
    exact or taken in a fixed order, so the result depends neither on the number of processes nor on chance.

    Args:
        images: the images.
        progress: show a progress bar while files are read.

    Returns:
        float64 (3,), the eigenvalues from the largest on, and float64 (3, 3), their eigenvectors as rows of
        length 1. The largest entry of each, by magnitude, is positive.

    Raises:
        DataError: a file, which is named, cannot be decoded.
    """
    moments = (
        _of_pixels(images.pixels) if images.pixels is not None else _of_files(images.paths or (), progress)
    )
    mean, products = moments[:3] / 255, moments[3:].reshape(3, 3) / 255**2
    values, vectors = np.linalg.eigh(products - np.outer(mean, mean))
    values, vectors = values[::-1].clip(0), vectors.T[::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    return values, vectors * np.sign(largest)


def _moments(pixels: NDArray[np.uint8]) -> tuple[_Matrix, int]:
    """Return the sums of R, G, B and of their nine products over all pixels, float64 (12,), and their number.

    In float64 these sums of whole numbers are exact, in any order, for up to 10**11 pixels.
    """
    rgb = pixels.reshape(-1, 3).astype(np.float64)
    return np.concatenate([rgb.sum(axis=0), (rgb.T @ rgb).ravel()]), len(rgb)


def _of_pixels(pixels: NDArray[np.uint8]) -> _Matrix:
    """Return the means of what :func:`_moments` sums."""
    parts = [_moments(pixels[i : i + _DECODED_CHUNK]) for i in range(0, len(pixels), _DECODED_CHUNK)]
    sums, counts = zip(*parts, strict=True)
    mean: _Matrix = np.sum(sums, axis=0) / sum(counts)
    return mean


def _of_files(paths: Sequence[Path | str], progress: bool) -> _Matrix:
    """Return the mean over the files of their means of what :func:`_moments` sums."""
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), SAMPLE)).round().astype(int)
    tasks = [[paths[i] for i in chosen[start : start + _CHUNK]] for start in range(0, len(chosen), _CHUNK)]
    parts: list[Any] = [None] * len(tasks)
    with tqdm(
        total=len(chosen), desc="reading colours", unit="image", disable=None if progress else True
    ) as bar:
        for number, part in map_unordered(_means_of_files, tasks, available_cores()):
            parts[number] = part
            bar.update(len(part))
    mean: _Matrix = np.concatenate(parts).mean(axis=0)
    return mean


def _means_of_files(paths: Sequence[Path]) -> _Matrix:
    rows = []
    for path in paths:
        sums, count = _moments(decode_image(path))
        rows.append(sums / count)
    return np.array(rows)
