"""The test set, asked once: single crop and ten-crop, on any network and data set."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fastalex.config import Config
from fastalex.data import ImageSet, Views, build_loader
from fastalex.distributed.processes import ALONE, World
from fastalex.runtime import Runtime
from fastalex.training.metrics import Errors, errors, predict

TEN_CROP = 10


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network does on a split.

    Attributes:
        single_crop: errors from the centre crop.
        ten_crop: errors from the mean of the softmax over corners, centre and their mirror images.
        views: how many views that were: 10, or 5 where ``data.flip=none`` leaves out the mirror images.
        probabilities: of the ten-crop, fp32 ``(N, classes)``, on the CPU.
    """

    single_crop: Errors
    ten_crop: Errors
    views: int
    probabilities: torch.Tensor

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, as ``summary.json`` and ``evaluation.json`` hold them."""
        return {
            "top1_error": self.ten_crop.top1_error,
            "top5_error": self.ten_crop.top5_error,
            "single_crop": dataclasses.asdict(self.single_crop),
            "ten_crop": {**dataclasses.asdict(self.ten_crop), "views": self.views},
        }

    def table(self, title: str) -> str:
        """Return the figures as the table that a command prints."""
        name = "ten-crop" if self.views == TEN_CROP else f"ten-crop, unmirrored ({self.views} views)"
        rows = [(title, "top-1 error", "top-5 error")]
        for label, figures in (("single crop", self.single_crop), (name, self.ten_crop)):
            rows.append((f"  {label}", f"{figures.top1_error:.4f}", f"{figures.top5_error:.4f}"))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{first:<{width}}  {top1:>11}  {top5:>11}" for first, top1, top5 in rows)


def evaluate_model(
    network: nn.Module, images: ImageSet, config: Config, runtime: Runtime, world: World = ALONE
) -> Evaluation:
    """Run a network over a split twice: once with the centre crop, once with ten-crop.

    Args:
        network: whole, on the runtime's device.
        images: the split.
        config: of the run.
        runtime: the device and the arithmetic.
        world: the processes that share the images, each of which then has the figures.
    """
    size = max(1, config.train.batch_size // world.size)
    views = TEN_CROP
    results = {}
    for kind, batch_size in ((Views.center, size), (Views.ten_crop, max(1, size // views))):
        loader = build_loader(
            images,
            config.data,
            config.loader,
            views=kind,
            batch_size=batch_size,
            runtime=runtime,
            world=world,
            network=network,
        )
        results[kind] = predict(network, loader, runtime, world)
    probabilities, labels = results[Views.ten_crop]
    return Evaluation(
        single_crop=errors(*results[Views.center]),
        ten_crop=errors(probabilities, labels),
        views=5 if config.data.flip.value == "none" else TEN_CROP,
        probabilities=probabilities.cpu(),
    )
