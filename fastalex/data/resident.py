"""``loader=resident``: all decoded images stay on the device as uint8; one kernel computes each batch.

Order, offsets and flips are drawn on the device too, so that after the first batch only kernel launches are
sent to it. On the CPU the images are not copied.

There is no prefetching. A GPU queues ``augment`` after the previous step; on two CPU cores a batch takes less
than 1% of a training step (``benchmarks/test_augment.py``), less than a prefetching thread would cost by
competing for the cores.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastalex.config import DataConfig, Fit, Graph, LoaderConfig
from fastalex.data.imageset import DataSplits, ImageSet
from fastalex.data.loader import PlannedLoader, Views
from fastalex.data.sampling import EpochPlan
from fastalex.errors import DataError
from fastalex.kernels import LazyBatch, augment, ten_crop
from fastalex.kernels.augment import ten_crop_views


def fits(splits: DataSplits, room: int | None) -> bool:
    """Return whether all images of a data set are decoded and fit the device together.

    All splits count: training and validation images stay on the device during the final test.

    Args:
        splits: the data set.
        room: bytes available for images; None for a CPU, whose memory holds the decoded images already.
    """
    pixels = [images.pixels for images in (splits.train, splits.validation, splits.test)]
    decoded = {id(array): array.nbytes for array in pixels if array is not None}  # splits may share an array
    return all(array is not None for array in pixels) and (room is None or sum(decoded.values()) <= room)


def can_fold(
    network: nn.Module | None, images: ImageSet, data: DataConfig, loader: LoaderConfig, device: torch.device
) -> bool:
    """Return whether the network accepts lazy batches of these images and is faster with them.

    It requires the resident loader, a CPU, a network with an attribute ``stride_over_crops``, and a resize
    that is a multiple of each image side times this stride: otherwise the outputs of a crop need too many
    different folded weights. Images that keep their shape have to be square. Colours may be shifted.

    Args:
        network: the network that consumes the batches, or None.
        images: the split to load.
        data: its ``resize`` is the size to which images are enlarged, in pixels, as ``fit`` says.
        loader: ``loader.fold=false`` turns lazy batches off.
        device: the device of the batches.
    """
    stride = getattr(network, "stride_over_crops", None)
    if stride is None or images.pixels is None or device.type != "cpu":
        return False
    height, width = images.pixels.shape[1:3]
    is_multiple = all(data.resize % (side * stride) == 0 for side in (height, width))
    is_whole = data.fit is Fit.square or height == width  # the square is all of the image
    return loader.fold and loader.name == "resident" and is_multiple and is_whole


class ResidentLoader(PlannedLoader):
    """Loader of images on the device; :class:`fastalex.data.loader.Loader` is its interface.

    Loaders over the same split share its images on the device. The arguments are those of
    :func:`fastalex.data.build_loader`.

    Raises:
        DataError: the images are not decoded: they are files of several sizes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.images.pixels is None:
            raise DataError(
                f"loader.name=resident needs images that are decoded and of one small size, but these "
                f"{len(self.images)} are files of their own sizes; use loader=torchvision or loader=dali"
            )
        self._pixels = _on_device(self.images.pixels, self.device)
        self._labels = torch.from_numpy(self.images.labels).to(self.device)
        folds = can_fold(self.network, self.images, self.data, self.loader, self.device)
        is_written_in_place = (
            self.graph is Graph.step
            and self.views is Views.random
            and self.network is not None  # otherwise nobody may know of lazy batches
            and self.channels_last
        )
        self._lazy = folds or is_written_in_place

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        plan = self.plan(self.device)
        for number in range(self.start_batch, len(self)):
            rows = plan.batch(number, self.batch_size)
            images: Tensor | LazyBatch
            if self._lazy:
                images = self._crops(rows)
            elif self.views is Views.ten_crop:
                images = ten_crop(
                    self._pixels.tensor,
                    indices=rows.indices,
                    mirror=self.num_views == 10,
                    keep_shape=self.keep_shape,
                    **self.geometry,
                )
            else:
                images = augment(
                    self._pixels.tensor,
                    rows.offsets,
                    rows.flips,
                    indices=rows.indices,
                    colors=rows.colors,
                    keep_shape=self.keep_shape,
                    **self.geometry,
                )
            if isinstance(images, Tensor) and not self.channels_last:
                images = images.contiguous()
            yield images, self._labels[rows.indices]

    def _crops(self, rows: EpochPlan) -> LazyBatch:
        indices, offsets, flips = rows.indices, rows.offsets, rows.flips
        if self.views is Views.ten_crop:
            mirror = self.num_views == 10
            offsets, flips = ten_crop_views(self.data.resize, self.data.crop, mirror, self.device)
            offsets, flips = offsets.repeat(len(rows), 1), flips.repeat(len(rows))
            indices = indices.repeat_interleave(self.num_views)
        return LazyBatch(
            self._pixels.tensor,
            indices,
            offsets,
            flips,
            colors=rows.colors,
            keep_shape=self.keep_shape,
            **self.geometry,
        )


class _DevicePixels:
    """A split's images on a device. It keeps the array alive, so that no other array gets its id."""

    def __init__(self, pixels: NDArray[np.uint8], device: torch.device) -> None:
        self.pixels = pixels
        with warnings.catch_warnings():  # images may be mapped read-only; nothing here writes to them
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.tensor = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)


_resident: WeakValueDictionary[tuple[int, torch.device], _DevicePixels] = WeakValueDictionary()


def _on_device(pixels: NDArray[np.uint8], device: torch.device) -> _DevicePixels:
    """Return the images on the device: copied for the first loader, freed with the last."""
    key = id(pixels), device
    found = _resident.get(key)
    if found is None:
        found = _resident[key] = _DevicePixels(pixels, device)
    return found
