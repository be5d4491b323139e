"""Any number of image files as a stream of image sets, so that memory does not grow with their number.

The files of a set are read as an evaluation of the same images would read them, with the same loader. A
damaged file does not end the stream if it may be left out: it is read as a black image and marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastalex.config import LoaderConfig, OnError
from fastalex.data.cache import common_small_shape, read_uncached
from fastalex.data.decode import DamagedImageError, decode_image
from fastalex.data.imageset import ImageSet
from fastalex.data.workers import num_workers
from fastalex.errors import DataError

WINDOW = 1 << 16  # files whose names are in memory; a loader's workers start anew for each so many
DECODED = 64 << 20  # bytes of decoded images in memory


@dataclass(frozen=True)
class Window:
    """The next N files of a stream.

    Attributes:
        paths: the files.
        images: the same as an image set; the label of an image is its place in ``paths``.
        loader: the loader of the set; its name is ``resident`` or ``torchvision``.
        damaged: bool ``(N,)``, in memory that is shared with the loader's workers: whether a file that was
            read is damaged, and its image a black one.
    """

    paths: Sequence[Path]
    images: ImageSet
    loader: LoaderConfig
    damaged: Tensor


@dataclass(frozen=True)
class _MarkedFiles(ImageSet):
    """Files of which a damaged one is marked, and read as one black pixel."""

    damaged: Tensor | None = None

    def image(self, i: int) -> NDArray[np.uint8]:
        try:
            return super().image(i)
        except DataError:
            assert self.damaged is not None
            self.damaged[i] = True
            return np.zeros((1, 1, 3), np.uint8)


def windows(
    paths: Iterable[Path], loader: LoaderConfig, batch_size: int, on_error: OnError
) -> Iterator[Window]:
    """Yield image files in parts, in their order. Every part but the last is of whole batches.

    Args:
        paths: the files.
        loader: that of the network's run. If it held decoded images (``resident``), images that are small and
            of one size are decoded and held too; all others are decoded by the torchvision loader's workers.
        batch_size: images in a batch.
        on_error: whether a damaged or missing file is an error, or is marked.

    Raises:
        DataError: a file is damaged or cannot be read, and is not to be marked. Of images that are not
            held, the loader raises it.
    """
    rest = iter(paths)
    tolerant = on_error is OnError.skip
    while window := list(islice(rest, _whole_batches(WINDOW, batch_size))):
        shape = None
        if loader.name in ("auto", "resident"):
            shape = common_small_shape(window, DataError)
        if shape is None:
            yield _files(window, loader, batch_size, tolerant)
            continue
        step = _whole_batches(DECODED // (3 * shape[0] * shape[1]), batch_size)
        for first in range(0, len(window), step):
            part = window[first : first + step]
            yield _decoded(part, loader, tolerant) or _files(part, loader, batch_size, tolerant)


def reason(path: Path) -> str:
    """Return why a file is marked as damaged."""
    try:
        decode_image(path)
    except DamagedImageError as error:
        return error.reason
    except DataError as error:
        return str(error).removeprefix(f"{path} ")
    return "was damaged when it was read, and is not any more"


def _whole_batches(images: int, batch_size: int) -> int:
    return max(1, images // batch_size) * batch_size


def _files(paths: Sequence[Path], loader: LoaderConfig, batch_size: int, tolerant: bool) -> Window:
    batches = -(-len(paths) // batch_size)
    # A worker prepares whole batches, and a single batch is ready sooner without waiting for one to start.
    workers = min(num_workers(loader), batches) if batches > 1 else 0
    labels = np.arange(len(paths))
    damaged = torch.zeros(len(paths), dtype=torch.bool).share_memory_()
    images = (
        _MarkedFiles(labels, paths=tuple(paths), damaged=damaged)
        if tolerant
        else ImageSet(labels, paths=tuple(paths))
    )
    return Window(paths, images, replace(loader, name="torchvision", workers=workers), damaged)


def _decoded(paths: Sequence[Path], loader: LoaderConfig, tolerant: bool) -> Window | None:
    """Return decoded images; None if they are not of one size after all."""
    contents = read_uncached(paths, unreadable=tolerant)
    if contents.pixels is None:
        return None
    if contents.damaged and not tolerant:
        first, why = next(iter(contents.damaged.items()))
        raise DamagedImageError(paths[first], why)
    damaged = torch.zeros(len(paths), dtype=torch.bool)
    damaged[list(contents.damaged)] = True
    images = ImageSet(np.arange(len(paths)), pixels=contents.pixels)
    return Window(paths, images, replace(loader, name="resident"), damaged)
