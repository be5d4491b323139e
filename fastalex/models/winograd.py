"""Convolutions that may be computed by Winograd's algorithm, in AlexNet and in torchvision's networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastalex.kernels import winograd_conv2d

# Where Winograd's algorithm is faster in bf16 (benchmarks/test_winograd.py): 1.1 to 1.5 times in layers of so
# many channels and products, counted for one tap of the weight. With fewer products, transforming the weight
# outweighs what it saves, and with fewer channels transforming the tiles does.
BF16_CHANNELS = 128
BF16_PRODUCTS = 2**28


class WinogradConv2d(nn.Conv2d):
    """A 3x3 or 5x5 convolution that may be computed by Winograd's algorithm: ``fastalex.kernels.winograd``.

    Attributes:
        winograd: whether it is, on the CPU where that is faster. The runtime sets it.
    """

    winograd = False

    def forward(self, x: Tensor) -> Tensor:
        batch = x.dim() == 4 and self.weight.dtype == torch.float32  # what the operator takes
        if self.winograd and x.is_cpu and batch and self.groups == 1 and self._is_faster(x):
            return winograd_conv2d(x, self.weight, self.bias)
        return super().forward(x)

    def _is_faster(self, x: Tensor) -> bool:
        if x.dtype == torch.bfloat16:
            products = x.numel() * self.out_channels
            many = self.in_channels >= BF16_CHANNELS and products >= BF16_PRODUCTS
            return self.kernel_size == (3, 3) and many
        return x.dtype == torch.float32


def allow_winograd(model: nn.Module) -> nn.Module:
    """Make each 3x3 convolution that Winograd's algorithm can compute one that may be: its class changes.

    Weights, their names and the generator of random numbers stay as they are.

    Returns:
        The same network.
    """
    for layer in model.modules():
        if type(layer) is nn.Conv2d and _is_computable(layer):
            layer.__class__ = WinogradConv2d
    return model


def _is_computable(layer: nn.Conv2d) -> bool:
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and layer.groups == 1 and layer.padding_mode == "zeros"
