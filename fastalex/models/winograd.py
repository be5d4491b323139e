"""Convolutions that can leave their bias to the next layer, or use Winograd's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastalex.kernels import winograd_conv2d
from fastalex.kernels.winograd import CHANNELS, MANY_CHANNELS

# In bf16 Winograd's algorithm is faster, by 1.05 to 1.8 times, beyond these numbers (measured with
# benchmarks/test_winograd.py). With fewer products the cost of transforming the weight exceeds the saving,
# with fewer channels the cost of transforming the tiles.
BF16_CHANNELS = 64  # input channels, at least
BF16_PRODUCTS = 2**27  # more multiplications for one tap; twice as many with tiles along both axes


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, but the bias can be left to what follows: ``convolution(x, add_bias=False)``."""

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias if add_bias else None)


class WinogradConv2d(Conv2d):
    """A 3x3 or 5x5 convolution that can use Winograd's algorithm (:mod:`fastalex.kernels.winograd`).

    The arguments are those of ``nn.Conv2d``.

    Attributes:
        winograd: whether Winograd's algorithm is used where it applies and is faster, on the CPU. The runtime
            sets it.
        fast_bf16_products: whether the processor has bf16 matrix units (AMX), with which a plain 3x3
            convolution in bf16 is faster than Winograd's, and its gradients are not. The runtime sets it.
    """

    winograd = False
    fast_bf16_products = False

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        is_supported = x.dim() == 4 and self.weight.dtype == torch.float32 and self.groups == 1
        if self.winograd and add_bias and x.is_cpu and is_supported and self._is_faster(x):
            is_small = self.kernel_size == (3, 3)
            plain_output = self.fast_bf16_products and is_small and x.dtype == torch.bfloat16
            return winograd_conv2d(x, self.weight, self.bias, plain_output=plain_output)
        return super().forward(x, add_bias)

    def _is_faster(self, x: Tensor) -> bool:
        if self.in_channels % CHANNELS or self.out_channels % CHANNELS:
            return False
        if x.dtype == torch.bfloat16:
            both_axes = self.kernel_size == (3, 3) and self.in_channels >= MANY_CHANNELS
            products = x.numel() * self.out_channels // (2 if both_axes else 1)
            return self.in_channels >= BF16_CHANNELS and products > BF16_PRODUCTS
        return x.dtype == torch.float32


def allow_winograd(model: nn.Module) -> nn.Module:
    """Change the class of each convolution that Winograd's algorithm can compute to :class:`WinogradConv2d`.

    These are the 3x3 convolutions of stride 1 and zero padding 1, without groups or dilation. Weights, their
    names and the random generator's state stay unchanged.

    Args:
        model: the network; it is changed in place.

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
