"""The interface of every loader, and what their implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastalex.config import DataConfig, Fit, Flip, LoaderConfig
from fastalex.data import color
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

    random = "random"  # training: one crop at a random place, flipped as data.flip says
    center = "center"  # evaluation: the centre crop
    ten_crop = "ten_crop"  # evaluation: corners and centre, then their mirror images unless data.flip=none


class Loader(Protocol):
    """An iterable over the batches of one epoch: pairs of images and labels, on the device.

    Images are (B * V, 3, crop, crop) in the runtime's dtype: resized to a square of resize x resize pixels,
    as ``data.fit`` says, by torchvision's bilinear resize with ``antialias=True``, cropped, flipped, and
    normalised as (x / 255 + color - mean) / std. ``color`` is that of the epoch's plan with ``Views.random``
    and ``data.color=pca``, else 0.
    Labels are int64 (B,), unless CutMix has mixed the batch (:class:`fastalex.data.wrappers.CutMixLoader`).
    V is the number of views per image, which are adjacent: 1, or with ``Views.ten_crop`` 10 in the order of
    torchvision's TenCrop. With ``data.flip=none`` it is TenCrop's first 5: the network has never been trained
    on mirror images.

    Images are a :class:`fastalex.kernels.LazyBatch` if the network consumes lazy batches faster
    (:func:`fastalex.data.resident.can_fold`), or if a recorded training step reads all batches at the same
    place (``runtime.graph=step``).

    Attributes:
        num_samples: number of images that this rank yields per epoch.
    """

    num_samples: int

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this rank."""
        ...

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iterations yield.

        Args:
            epoch: the epoch, from 0.
            start_batch: number of batches to skip at the epoch's beginning.
        """
        ...

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        """Yield the batches of the chosen epoch: images and labels."""
        ...


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on the device, without waiting for the work queued there.

    A copy to a GPU is asynchronous only from pinned memory. The tensor is copied to pinned memory of its own
    first, even if it is pinned itself: the caller may overwrite it at once, and PyTorch keeps the pinned copy
    until the device has read it.

    Args:
        tensor: on the CPU, of any shape and dtype.
        device: where to copy it; for the CPU the tensor itself is returned.
    """
    if device.type == "cuda":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


class PlannedLoader(ABC):
    """Base class of the loaders: their arguments and the plan of an epoch.

    The arguments are those of :func:`fastalex.data.build_loader`; the interface is :class:`Loader`.
    """

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
        if views is Views.random:  # a run has computed them before, once for all its loaders
            values, vectors = color.components(data, images)
            data = replace(data, color_eigenvalues=values, color_eigenvectors=vectors)
        self.data = data
        self.loader = loader
        self.views = views
        self.batch_size = batch_size
        self.seed = seed
        self.device = runtime.device
        self.dtype = runtime.dtype
        self.channels_last = runtime.channels_last
        self.graph = runtime.graph
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
        """Number of views per image, V in :class:`Loader`."""
        if self.views is not Views.ten_crop:
            return 1
        return 5 if self.data.flip is Flip.none else 10

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments of :func:`fastalex.kernels.augment` that are the same for every batch."""
        return {
            "resize": self.data.resize,
            "crop": self.data.crop,
            "mean": self.data.mean,
            "std": self.data.std,
            "dtype": self.dtype,
        }

    @property
    def keep_shape(self) -> bool:
        """The argument of :func:`fastalex.kernels.augment` that ``data.fit`` stands for."""
        return self.data.fit is Fit.shorter_side

    def _evaluation_plan(self) -> Tensor:
        return evaluation_plan(len(self.images), rank=self.world.rank, world_size=self.world.size)

    def plan(self, device: torch.device | str = "cpu") -> EpochPlan:
        """Return the plan of this rank's whole current epoch.

        With ``Views.ten_crop`` only its indices are of use.

        Args:
            device: where the plan is drawn; a CPU and a GPU draw different numbers.
        """
        if self.views is Views.random:
            return training_plan(
                len(self.images),
                flip=self.data.flip,
                max_offset=self.data.resize - self.data.crop,
                offset=None if self.data.random_crop else center_offset(self.data.resize, self.data.crop),
                seed=self.seed,
                epoch=self.epoch,
                batch_size=self.batch_size,
                rank=self.world.rank,
                world_size=self.world.size,
                device=device,
                color_steps=color.steps(self.data),
            )
        indices = self._evaluation_plan().to(device)
        offset = center_offset(self.data.resize, self.data.crop)
        offsets = torch.full((len(indices), 2), offset, dtype=torch.int32, device=device)
        return EpochPlan(indices, offsets, torch.zeros(len(indices), dtype=torch.bool, device=device))

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]: ...
