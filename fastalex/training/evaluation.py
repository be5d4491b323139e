"""Evaluation of a network on a split, with a single crop and with ten-crop."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fastalex.config import Config
from fastalex.data import ImageSet, Loader, Views, build_loader
from fastalex.distributed.processes import ALONE, World
from fastalex.runtime import Runtime
from fastalex.training.metrics import Errors, errors, predict

TEN_CROP = 10


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The errors of a network on a split.

    Attributes:
        single_crop: errors from the centre crop.
        ten_crop: errors from the softmax averaged over corners, centre and their mirror images.
        views: number of those views: 10, or 5 with ``data.flip=none``, which leaves out the mirror images.
        probabilities: averaged class probabilities of the ten-crop, fp32 ``(N, classes)``, on the CPU.
    """

    single_crop: Errors
    ten_crop: Errors
    views: int
    probabilities: torch.Tensor

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as they appear in ``summary.json`` and ``evaluation.json``."""
        return {
            "top1_error": self.ten_crop.top1_error,
            "top5_error": self.ten_crop.top5_error,
            "single_crop": dataclasses.asdict(self.single_crop),
            "ten_crop": {**dataclasses.asdict(self.ten_crop), "views": self.views},
        }

    def table(self, title: str) -> str:
        """Return the figures as a text table.

        Args:
            title: heading of the first column.
        """
        name = "ten-crop" if self.views == TEN_CROP else f"ten-crop, unmirrored ({self.views} views)"
        rows = [(title, "top-1 error", "top-5 error")]
        for label, figures in (("single crop", self.single_crop), (name, self.ten_crop)):
            rows.append((f"  {label}", f"{figures.top1_error:.4f}", f"{figures.top5_error:.4f}"))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{first:<{width}}  {top1:>11}  {top5:>11}" for first, top1, top5 in rows)


def evaluation_batch(config: Config, views: Views, world: World = ALONE) -> int:
    """Return the number of images in a batch of an evaluation; with ten views an image, a tenth as many.

    Args:
        config: the run's configuration; its ``train.batch_size`` is used.
        views: ``center`` or ``ten_crop``.
        world: the ranks that share a batch.
    """
    size = config.train.batch_size // world.size
    return max(1, size // TEN_CROP if views is Views.ten_crop else size)


def evaluation_loader(
    network: nn.Module,
    images: ImageSet,
    config: Config,
    runtime: Runtime,
    views: Views,
    world: World = ALONE,
) -> Loader:
    """Build the loader of an evaluation; the arguments are those of :func:`evaluate_model`.

    Args:
        views: ``center`` or ``ten_crop``.
    """
    return build_loader(
        images,
        config.data,
        config.loader,
        views=views,
        batch_size=evaluation_batch(config, views, world),
        runtime=runtime,
        world=world,
        network=network,
    )


def evaluate_model(
    network: nn.Module, images: ImageSet, config: Config, runtime: Runtime, world: World = ALONE
) -> Evaluation:
    """Evaluate a network on a split with the centre crop and with ten-crop; collective.

    Args:
        network: the unsharded network, on the runtime's device.
        images: the split.
        config: the run's configuration; its ``data``, ``loader`` and ``train.batch_size`` are used.
        runtime: the device, dtype and memory format.
        world: the ranks that share the images; each returns the same figures.

    Raises:
        DataError: an image cannot be read.
    """
    results = {}
    for views in (Views.center, Views.ten_crop):
        loader = evaluation_loader(network, images, config, runtime, views, world)
        results[views] = predict(network, loader, runtime, world)
    probabilities, labels = results[Views.ten_crop]
    return Evaluation(
        single_crop=errors(*results[Views.center]),
        ten_crop=errors(probabilities, labels),
        views=5 if config.data.flip.value == "none" else TEN_CROP,
        probabilities=probabilities.cpu(),
    )
