"""Top-1 and top-5 error of a network over a loader, from one crop or the mean over ten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex.distributed.processes import ALONE, World
from fastalex.kernels import LazyBatch
from fastalex.runtime import Runtime

# Batch shapes of ``evaluation.evaluate_model``: a full and a last batch, for centre crop and for ten-crop.
EVALUATION_PASSES = 4


@dataclass(frozen=True)
class Errors:
    """Errors and loss of a network on a split.

    Attributes:
        top1_error: fraction of the images whose most probable class is not the label.
        top5_error: fraction of the images whose label is not among the five most probable classes.
        loss: mean cross-entropy, in nats, of the probabilities averaged over the views. Probabilities are
            clamped to fp32's smallest normal number, so one image adds at most 87.3 nats.
        images: number of images.
    """

    top1_error: float
    top5_error: float
    loss: float
    images: int


@torch.no_grad()
def predict_batches(
    network: nn.Module, loader: Iterable[tuple[Tensor | LazyBatch, Tensor]], runtime: Runtime
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the class probabilities and labels of each batch of a loader.

    Args:
        network: the network in evaluation mode, on the runtime's device.
        loader: as for :func:`predict`.
        runtime: the device, dtype and memory format.

    Yields:
        Probabilities, fp32 ``(B, classes)``: the softmax averaged over an image's views; and labels, int64
        ``(B,)``; both on the runtime's device.
    """
    for images, labels in loader:
        with runtime.autocast():
            logits = network(images)
        views = images.shape[0] // labels.shape[0]
        softmax = F.softmax(logits.float(), dim=1)
        yield softmax.view(labels.shape[0], views, -1).mean(dim=1), labels


def predict(
    network: nn.Module,
    loader: Iterable[tuple[Tensor | LazyBatch, Tensor]],
    runtime: Runtime,
    world: World = ALONE,
) -> tuple[Tensor, Tensor]:
    """Run a network over a loader in evaluation mode; collective.

    Args:
        network: the network, on the runtime's device; its training mode is restored.
        loader: yields images ``(B * V, 3, crop, crop)`` in the runtime's dtype or a lazy batch, the V views
            of an image adjacent, and labels, int64 ``(B,)``.
        runtime: the device, dtype and memory format.
        world: the ranks whose loaders share the images.

    Returns:
        Class probabilities, fp32 ``(N, classes)``: the softmax averaged over an image's views; and labels,
        int64 ``(N,)``. Both cover all ranks' images and are on the runtime's device.
    """
    was_training = network.training
    network.eval()
    probabilities, labels = zip(*predict_batches(network, loader, runtime), strict=True)
    network.train(was_training)
    return world.interleave(torch.cat(probabilities)), world.interleave(torch.cat(labels))


def errors(probabilities: Tensor, labels: Tensor) -> Errors:
    """Compute errors and loss.

    Args:
        probabilities: of the classes, fp32 ``(N, classes)``.
        labels: int64 ``(N,)``.
    """
    top1 = probabilities.argmax(dim=1) == labels  # not topk's first: it may break ties differently
    top5 = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
    hits = (top5 == labels[:, None]).any(dim=1) | top1
    likelihood = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    return Errors(
        top1_error=1 - top1.double().mean().item(),
        top5_error=1 - hits.double().mean().item(),
        loss=-likelihood.log().double().mean().item(),
        images=labels.numel(),
    )
