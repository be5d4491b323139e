"""What every loader is and has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn

from fastalex.config import DataConfig, Flip, LoaderConfig
from fastalex.data.imageset import ImageSet
from fastalex.data.sampling import (
    EpochPlan,
    center_offset,
    evaluation_plan,
    training_plan,
    training_samples,
)
from fastalex.distributed.processes import ALONE, World
from fastalex.kernels import LazyBatch
from fastalex.runtime import Runtime


class Views(Enum):
    """Which crops of an image a loader yields."""

    random = "random"  # training: one, at a random place, mirrored as data.flip says
    center = "center"  # evaluation: the centre
    ten_crop = (
        "ten_crop"  # evaluation: corners and centre, and their mirror images (none of those if flip=none)
    )


class Loader(Protocol):
    """An iterable over the batches of one epoch: pairs of images and labels, on the device.

    Images are (B * V, 3, crop, crop), resized to resize x resize as torchvision's bilinear ``antialias=True``
    does, cropped, flipped and then (x / 255 - mean) / std; labels are int64 (B,), or as CutMixLoader says. V
    is 1, but with ``Views.ten_crop`` 10, in the order of torchvision's TenCrop, or its first 5 if data.flip
    is ``none``: a network that never saw a mirror image must not be asked about one. The views of one image
    are adjacent.

    Where the network consumes lazy batches faster (:func:`fastalex.data.resident.can_fold`), images are a
    :class:`fastalex.kernels.LazyBatch`.
    """

    num_samples: int  # the images that this rank yields each epoch

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        ...

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses the epoch that the next iterations yield, without its first ``start_batch`` batches."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]: ...


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, as it is now, without waiting for what the device is still busy with.

    A copy to a GPU waits for it unless it is from pinned memory. That is memory of its own even where the
    tensor is pinned: the tensor may be overwritten before the device has read it, and PyTorch keeps this
    until then.
    """
    if device.type == "cuda":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


class PlannedLoader(ABC):
    """The part of a loader that is the same in all of them: the arguments, and the plan of an epoch."""

    def __init__(
        self,
        images: ImageSet,
        data: DataConfig,
        loader: LoaderConfig,
        *,
        views: Views,
        batch_size: int,
        runtime: Runtime,
        world: World = ALONE,
        seed: int = 0,
        network: nn.Module | None = None,
    ) -> None:
        self.images = images
        self.data = data
        self.loader = loader
        self.views = views
        self.batch_size = batch_size
        self.seed = seed
        self.device = runtime.device
        self.dtype = runtime.dtype
        self.channels_last = runtime.channels_last
        self.world = world
        self.network = network
        self.epoch = 0
        self.start_batch = 0
        if views is Views.random:
            self.num_samples = training_samples(
                len(images), flip=data.flip, batch_size=batch_size, world_size=world.size
            )
        else:
            self.num_samples = len(self._evaluation_plan())

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch = epoch
        self.start_batch = start_batch

    @property
    def num_views(self) -> int:
        """V: how many crops of each image."""
        if self.views is not Views.ten_crop:
            return 1
        return 5 if self.data.flip is Flip.none else 10

    def _evaluation_plan(self) -> Tensor:
        return evaluation_plan(len(self.images), rank=self.world.rank, world_size=self.world.size)

    def plan(self, device: torch.device | str = "cpu") -> EpochPlan:
        """This rank's whole current epoch, drawn on ``device``; ten_crop needs only its indices."""
        if self.views is Views.random:
            return training_plan(
                len(self.images),
                flip=self.data.flip,
                max_offset=self.data.resize - self.data.crop,
                seed=self.seed,
                epoch=self.epoch,
                batch_size=self.batch_size,
                rank=self.world.rank,
                world_size=self.world.size,
                device=device,
            )
        indices = self._evaluation_plan().to(device)
        offset = center_offset(self.data.resize, self.data.crop)
        offsets = torch.full((len(indices), 2), offset, dtype=torch.int32, device=device)
        return EpochPlan(indices, offsets, torch.zeros(len(indices), dtype=torch.bool, device=device))

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]: ...
