"""Top-1 and top-5 error of a network over a loader, with a single crop or the mean of ten."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex.distributed.processes import ALONE, World
from fastalex.kernels import LazyBatch
from fastalex.runtime import Runtime

# Shapes that ``evaluation.evaluate`` calls a network with: centre crop and ten-crop, a batch and the last.
EVALUATION_PASSES = 4


@dataclass(frozen=True)
class Errors:
    """What a network does wrong on a split.

    Attributes:
        top1_error: share of the images whose most probable class is not the label.
        top5_error: share of the images whose label is not among the five most probable classes.
        loss: mean cross-entropy, in nats, of the probabilities averaged over the views. An image counts for
            87.3 at most, that of the least probability that fp32 holds.
        images: how many there were.
    """

    top1_error: float
    top5_error: float
    loss: float
    images: int


@torch.no_grad()
def predict(
    network: nn.Module,
    loader: Iterable[tuple[Tensor | LazyBatch, Tensor]],
    runtime: Runtime,
    world: World = ALONE,
) -> tuple[Tensor, Tensor]:
    """Run a network over a loader in evaluation mode.

    Args:
        network: on the runtime's device; left in the mode it came in.
        loader: yields ``(B * V, 3, crop, crop)`` images, the V views of an image side by side, and ``(B,)``
            labels.
        runtime: the device and the arithmetic.
        world: the processes whose loaders share the images.

    Returns:
        Class probabilities ``(N, classes)``, fp32, the mean over an image's views of their softmax; and the
        labels ``(N,)``, int64. Both on the runtime's device.
    """
    was_training = network.training
    network.eval()
    probabilities, labels = [], []
    for images, targets in loader:
        with runtime.autocast():
            logits = network(images)
        views = images.shape[0] // targets.shape[0]
        softmax = F.softmax(logits.float(), dim=1)
        probabilities.append(softmax.view(targets.shape[0], views, -1).mean(dim=1))
        labels.append(targets)
    network.train(was_training)
    return world.interleave(torch.cat(probabilities)), world.interleave(torch.cat(labels))


def errors(probabilities: Tensor, labels: Tensor) -> Errors:
    """Compute errors and loss from class probabilities ``(N, classes)`` and labels ``(N,)``."""
    top1 = probabilities.argmax(dim=1) == labels  # where classes tie, topk may prefer another than argmax
    top5 = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
    hits = (top5 == labels[:, None]).any(dim=1) | top1
    likelihood = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    return Errors(
        top1_error=1 - top1.double().mean().item(),
        top5_error=1 - hits.double().mean().item(),
        loss=-likelihood.log().double().mean().item(),
        images=labels.numel(),
    )
