"""Adaptive average pooling followed by a fully connected layer, computed without upsampling the image."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastalex.models.factored_linear import FactoredLinear, Tap

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

    def pools_weight(self, height: int, width: int) -> bool:
        """Whether the weight, and not the image, is pooled for images of this size."""
        # At size x size the pool is the identity. A DTensor holds a shard of the weight, which would have to
        # be pooled on the rank that holds it.
        is_small = height * width * MIN_PIXEL_RATIO <= self.size**2
        return is_small and (height, width) != (self.size, self.size) and not isinstance(self.weight, DTensor)

    def pooling_of(self, shape: torch.Size) -> Tensor | None:
        return self._pooling(*shape[2:]) if len(shape) == 4 else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # flatten() reads a channels-last tensor in NCHW order: the weights mean the same in both layouts.
        if self.pools_weight(height, width):
            return F.linear(x.flatten(1), self._pooled_weight(self._pooling(height, width)), self.bias)
        return super().forward(self._pooled_image(x).flatten(1))

    def tapped(self, x: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """As :meth:`FactoredLinear.tapped`, of an image.

        Returns:
            The output ``(N, out_features)`` and the input, detached: ``(N, channels, H, W)`` if the weight
            was pooled, and else ``(N, in_features)``.
        """
        height, width = x.shape[-2:]
        if not self.pools_weight(height, width):
            return super().tapped(self._pooled_image(x).flatten(1), tap)
        weight = self._pooled_weight(self._pooling(height, width))
        output, input = self._tapped(x.flatten(1), weight.detach(), tap)
        return output, input.view(-1, self.channels, height, width)

    def _pooled_image(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        if isinstance(x, DTensor):  # every rank has all images; PyTorch 2.11 does not pool a DTensor
            pooled = F.adaptive_avg_pool2d(x.to_local(), self.size)
            return DTensor.from_local(pooled, x.device_mesh, x.placements, run_check=False)
        return F.adaptive_avg_pool2d(x, self.size)

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
