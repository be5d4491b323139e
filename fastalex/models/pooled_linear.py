"""Adaptive average pooling followed by a fully connected layer, computed without upsampling the image."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastalex.models.factored_linear import FactoredLinear

# The weight is pooled if the input has at least this many times fewer pixels than the pool's output. Below
# that, reading and writing the whole weight takes as long as it saves (benchmarks/test_pooled_linear.py).
MIN_PIXEL_RATIO = 4


class PooledLinear(FactoredLinear):
    """``Linear(flatten(adaptive_avg_pool2d(x, size)))``, in the order that takes fewer multiplications.

    At a smaller crop than the network is designed for, the pool enlarges the image: it repeats pixels, and
    the layer multiplies each of them several times. Both steps are linear, so the weight can be pooled
    instead, once per batch: ``W (P x) = (W P) x``, where P is the pooling matrix.

    Args:
        channels: channels of the image.
        size: height and width of the pool's output, in pixels.
        out_features: width of the layer; its ``weight`` is ``(out_features, channels * size * size)``.

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
        # At size x size the pool is the identity. A DTensor holds a shard of the weight, which would have to
        # be pooled on the rank that holds it.
        if (height, width) != (self.size, self.size):
            if height * width * MIN_PIXEL_RATIO <= self.size**2 and not isinstance(weight, DTensor):
                pooling = self._pooling(height, width)
                weight = self._pooled_weight(pooling)
            else:
                x = F.adaptive_avg_pool2d(x, self.size)
        # flatten() reads a channels-last tensor in NCHW order: the weights mean the same in both layouts.
        return self.linear(x.flatten(1), weight, pooling)

    def _pooling(self, height: int, width: int) -> Tensor:
        """Return P transposed, ``(height * width, size * size)``: row i is the pooled image of pixel i."""
        pixels = torch.eye(height * width, dtype=self.weight.dtype, device=self.weight.device)
        return F.adaptive_avg_pool2d(pixels.view(-1, 1, height, width), self.size).flatten(1)

    def _pooled_weight(self, pooling: Tensor) -> Tensor:
        """Return W P, ``(out_features, channels * height * width)``, in the weight's own dtype."""
        device = self.weight.device.type
        # "meta", on which operations are counted, has no autocast. Asking PyTorch whether a device has it
        # breaks torch.compile's graph before torch 2.14.
        without_autocast = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        with without_autocast:
            pooled = self.weight.view(-1, self.size**2) @ pooling.t()
        return pooled.view(self.out_features, -1)
