"""Convolutions that can leave their bias to the next layer, or use Winograd's algorithm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastalex.kernels import winograd_conv2d
from fastalex.kernels.winograd import CHANNELS, MANY_CHANNELS


class Limits(NamedTuple):
    """Sizes beyond which Winograd's algorithm is faster than a plain convolution in bf16.

    With fewer products the cost of transforming the weight exceeds the saving, with fewer channels the cost
    of transforming the tiles. Beyond these sizes `benchmarks/test_winograd.py` found forward and backward
    pass together to be faster.

    Attributes:
        channels: input channels, at least.
        five_taps: multiplications of a plain 5x5 convolution for one tap (elements of x times output
            channels); more than that.
        three_taps: the same of a 3x3 convolution whose tiles extend along one axis.
        both_axes: the same of a 3x3 convolution whose tiles extend along both.
    """

    channels: int
    five_taps: int
    three_taps: int
    both_axes: int


VECTOR_UNITS = Limits(64, five_taps=2**27, three_taps=2**27, both_axes=2**28)
# Matrix units (AMX) multiply faster, so that transforms take a larger share; but PyTorch's own backward pass
# on images of few pixels is so slow there that tiles along both axes win at smaller sizes.
MATRIX_UNITS = Limits(96, five_taps=2**28, three_taps=2**30, both_axes=2**26)


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
        matrix_units: whether the processor multiplies bf16 by matrix units (AMX), with which other sizes are
            faster. The runtime sets it.
    """

    winograd = False
    matrix_units = False

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        is_supported = x.dim() == 4 and self.weight.dtype == torch.float32 and self.groups == 1
        if self.winograd and add_bias and x.is_cpu and is_supported and self._is_faster(x):
            return winograd_conv2d(x, self.weight, self.bias)
        return super().forward(x, add_bias)

    def _is_faster(self, x: Tensor) -> bool:
        if self.in_channels % CHANNELS or self.out_channels % CHANNELS:
            return False
        if x.dtype != torch.bfloat16:
            return x.dtype == torch.float32
        limits = MATRIX_UNITS if self.matrix_units else VECTOR_UNITS
        if self.kernel_size == (5, 5):
            products = limits.five_taps
        else:
            products = limits.both_axes if self.in_channels >= MANY_CHANNELS else limits.three_taps
        return self.in_channels >= limits.channels and x.numel() * self.out_channels > products


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
