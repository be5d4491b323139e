"""``loader=resident``: decoded images stay on the device as uint8, and one kernel makes each batch of them.

Order, offsets and flips are drawn on the device too, so after the first batch nothing crosses to it but
kernel launches. On the CPU the images are used where they lie, without a copy.

Nothing runs ahead of the training loop: a GPU queues `augment` behind the step before it, and on two CPU
cores a batch takes under 1% of a training step (``benchmarks/test_augment.py``): less than a thread that
competes for the same cores would cost.
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

from fastalex.config import DataConfig, LoaderConfig
from fastalex.data.imageset import DataSplits, ImageSet
from fastalex.data.loader import PlannedLoader, Views
from fastalex.data.sampling import EpochPlan
from fastalex.errors import DataError
from fastalex.kernels import LazyBatch, ten_crop
from fastalex.kernels.augment import ten_crop_views


def fits(splits: DataSplits, room: int | None) -> bool:
    """Whether a data set can be resident: decoded, of one size, and all of it in so many bytes.

    Args:
        splits: all of them, for they are on the device together: a run keeps the images that it trained and
            validated on while it is tested.
        room: bytes for images; None where they are in memory already, as on a CPU.
    """
    pixels = [images.pixels for images in (splits.train, splits.validation, splits.test)]
    decoded = {id(array): array.nbytes for array in pixels if array is not None}  # splits may share theirs
    return all(array is not None for array in pixels) and (room is None or sum(decoded.values()) <= room)


def can_fold(
    network: nn.Module | None, images: ImageSet, data: DataConfig, loader: LoaderConfig, device: torch.device
) -> bool:
    """Whether the network takes lazy batches of these images, and is faster for it.

    Its first convolution must be able to consume them, from the resident loader, on the CPU; and each image
    must be enlarged by a whole multiple of the convolution's stride, or a crop has too many kinds of outputs.

    Args:
        network: that the batches are for; None for none in particular.
        images: of one split.
        data: gives the size that images are enlarged to.
        loader: may forbid it (``loader.fold=false``).
        device: of the batches.
    """
    stride = getattr(network, "stride_over_crops", None)
    if stride is None or images.pixels is None or device.type != "cpu":
        return False
    whole = all(data.resize % (side * stride) == 0 for side in images.pixels.shape[1:3])
    return loader.fold and loader.name == "resident" and whole


class ResidentLoader(PlannedLoader):
    """See :class:`fastalex.data.loader.Loader` for what it yields.

    Loaders over the same split share its images on the device.

    Raises:
        DataError: the images are files of several sizes, still to be decoded.
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
        self._lazy = can_fold(self.network, self.images, self.data, self.loader, self.device)

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        plan = self.plan(self.device)
        for number in range(self.start_batch, len(self)):
            rows = plan.batch(number, self.batch_size)
            images: Tensor | LazyBatch
            if self._lazy:
                images = self._crops(rows)
            elif self.views is Views.ten_crop:
                images = ten_crop(
                    self._pixels.tensor, indices=rows.indices, mirror=self.num_views == 10, **self._geometry
                )
            else:
                images = self._crops(rows).materialize()
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
        return LazyBatch(self._pixels.tensor, indices, offsets, flips, **self._geometry)

    @property
    def _geometry(self) -> dict[str, Any]:
        return {
            "resize": self.data.resize,
            "crop": self.data.crop,
            "mean": self.data.mean,
            "std": self.data.std,
            "dtype": self.dtype,
        }


class _DevicePixels:
    """A split's images on a device; holds the array too, so that its id stays its own."""

    def __init__(self, pixels: NDArray[np.uint8], device: torch.device) -> None:
        self.pixels = pixels
        with warnings.catch_warnings():  # images may be mapped read-only; nothing here writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.tensor = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)


_resident: WeakValueDictionary[tuple[int, torch.device], _DevicePixels] = WeakValueDictionary()


def _on_device(pixels: NDArray[np.uint8], device: torch.device) -> _DevicePixels:
    """The images on the device, moved there by the first loader that asks and dropped with the last."""
    key = id(pixels), device
    found = _resident.get(key)
    if found is None:
        found = _resident[key] = _DevicePixels(pixels, device)
    return found
