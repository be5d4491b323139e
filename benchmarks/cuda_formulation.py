"""AlexNet as it is formulated on CUDA, run on the CPU: the kernel after a convolution adds its bias."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex.models import alexnet


@contextlib.contextmanager
def cuda_formulation() -> Iterator[None]:
    """Within the block every :class:`~fastalex.models.alexnet.AlexNet` is formulated as on CUDA."""
    with mock.patch.object(alexnet, "kernel_adds_bias", return_value=True):
        yield


def distances(model: alexnet.AlexNet, images: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """How far two formulations are from the CPU's in fp32, on one batch: CUDA's, and the CPU's itself.

    Both are run in the dtype of the images, which for bf16 gives the second a distance, that of rounding.

    Args:
        model: in fp32, without dropout, on the CPU; it is not changed.
        images: ``(N, 3, H, W)``, fp32 or, for the network under autocast, bf16.
        labels: ``(N,)``, int64.

    Returns:
        For the logits and the gradient of each parameter, by its name: both distances, as the norm of the
        difference over the norm of the fp32 value.
    """
    exact = _logits_and_gradients(copy.deepcopy(model), images.float(), labels)
    usual = _logits_and_gradients(copy.deepcopy(model), images, labels)
    with cuda_formulation():
        ours = _logits_and_gradients(copy.deepcopy(model), images, labels)
    return {
        name: (_distance(ours[name], value), _distance(usual[name], value)) for name, value in exact.items()
    }


def _distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def _logits_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.dtype == torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **gradients}
