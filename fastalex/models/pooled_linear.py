"""A fully connected layer behind adaptive average pooling, which may be computed without pooling up."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastalex.models.factored_linear import FactoredLinear

# How many times fewer pixels must come in than are pooled up to: short of that, reading and writing the whole
# weight takes the time that is saved. benchmarks/test_pooled_linear.py has the figures.
WORTH_POOLING = 4


class PooledLinear(FactoredLinear):
    """``Linear(flatten(adaptive_avg_pool2d(x, size)))``, in the fewer products of the two orders.

    Pooling an image up, which happens at a smaller crop than the network is made for, repeats its pixels, and
    the layer then multiplies each of them several times. Both steps are linear, so the weight can be pooled
    instead, once for the batch: ``W (P x) = (W P) x``, where P is the matrix of the pooling.

    Args:
        channels: of the image.
        size: height and width to which it is pooled.
        out_features: of the layer; its ``weight`` is ``(out_features, channels * size * size)``.

    Shape:
        input ``(N, channels, H, W)``, output ``(N, out_features)``.
    """

    def __init__(self, channels: int, size: int, out_features: int) -> None:
        super().__init__(channels * size * size, out_features)
        self.channels = channels
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        weight, pooling = self.weight, None
        # At size x size the pool is an identity. A part of the weight, which is what a DTensor is of, would
        # have to be pooled where it lies.
        if (height, width) != (self.size, self.size):
            if height * width * WORTH_POOLING <= self.size**2 and not isinstance(weight, DTensor):
                pooling = self._pooling(height, width)
                weight = self._pooled_weight(pooling)
            else:
                x = F.adaptive_avg_pool2d(x, self.size)
        # flatten() walks a channels-last tensor in NCHW order: the weights mean the same in both layouts.
        return self.linear(x.flatten(1), weight, pooling)

    def _pooling(self, height: int, width: int) -> Tensor:
        """Return P, transposed: a row for each pixel, what the pool makes of it."""
        pixels = torch.eye(height * width, dtype=self.weight.dtype, device=self.weight.device)
        return F.adaptive_avg_pool2d(pixels.view(-1, 1, height, width), self.size).flatten(1)

    def _pooled_weight(self, pooling: Tensor) -> Tensor:
        """Return W P, ``(out_features, channels * height * width)``, in the weight's own precision."""
        device = self.weight.device.type
        # On "meta", where operations are counted, nothing is cast. Asking PyTorch whether a device casts
        # would break torch.compile's graph before torch 2.14.
        uncast = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        with uncast:
            pooled = self.weight.view(-1, self.size**2) @ pooling.t()
        return pooled.view(self.out_features, -1)
