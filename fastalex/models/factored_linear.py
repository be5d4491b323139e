"""A fully connected layer that can store its weight's gradient as two factors instead of their product.

Over a batch of N images the gradient is ``G.T @ X``, where G is the gradient of the layer's output, (N, out),
and X the layer's input, (N, in). AlexNet's two hidden layers have 55 million weights and 220 MB of gradient;
the factors of 128 images are 10 MB. They suffice for training: the gradient's norm follows from them, and the
weight can be updated a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass
class Factors:
    """The gradient of a layer's weight as factors, over a batch or a part of one.

    Attributes:
        output: gradient of the layer's output, ``(N, out_features)``.
        input: the layer's input, ``(N, channels * pixels)``.
        pooling: ``(pixels, pooled pixels)`` if the weight was pooled for this batch; the gradient of the
            layer's own weight is then each channel's pixels times this matrix. None if it was not.
        scale: factor of the product, ``()``; None means 1.
    """

    output: Tensor
    input: Tensor
    pooling: Tensor | None = None
    scale: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` (exclusive) of the gradient, in fp32 or wider.

        Args:
            start: first row: an output feature of the layer.
            stop: the row after the last.

        Returns:
            ``(stop - start, in_features)``.
        """
        product = self.output[:, start:stop].t() @ self.input
        product = product.to(torch.promote_types(product.dtype, torch.float32))
        return self._upsampled(product if self.scale is None else product.mul_(self.scale))

    def squared_norm(self) -> Tensor:
        """Return the square of the unscaled gradient's Frobenius norm, in fp64.

        ``|G.T X|^2 = trace(X.T G G.T X)``, which is the sum of the N^2 elements of ``(G G.T) * (X X.T)``.
        The elements cancel where the images' gradients do, so that a sum in fp32 could be negative.
        """
        output, images = self.output.double(), self._upsampled(self.input.double())
        return ((output @ output.t()) * (images @ images.t())).sum().clamp(min=0.0)

    def _upsampled(self, rows: Tensor) -> Tensor:
        if self.pooling is None:
            return rows
        pooling = self.pooling.to(rows.dtype)
        return (rows.view(-1, len(pooling)) @ pooling).view(len(rows), -1)


class FactoredLinear(nn.Linear):
    """``nn.Linear`` that stores its weight's gradient as factors inside :func:`keeping_factors`.

    The arguments are those of ``nn.Linear``.

    Attributes:
        factors: the list to which each backward pass appends, inside :func:`keeping_factors`; None outside,
            where the gradient goes to ``weight.grad`` as usual.
    """

    factors: list[Factors] | None = None

    @property
    def gradient(self) -> Factors | None:
        """The sum of all backward passes, as one :class:`Factors`; None before the first pass."""
        if self.factors and len(self.factors) > 1:
            self.factors[:] = [
                Factors(
                    torch.cat([part.output for part in self.factors]),
                    torch.cat([part.input for part in self.factors]),
                    self.factors[0].pooling,
                )
            ]
        return self.factors[0] if self.factors else None

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight)

    def linear(self, x: Tensor, weight: Tensor, pooling: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``(N, out_features)``.

        Args:
            x: ``(N, features)``.
            weight: ``(out_features, features)``: the layer's own weight, or one pooled from it.
            pooling: the pooling matrix, as in :class:`Factors`; None for the layer's own weight.
        """
        # The weight is detached below, so autograd reaches this layer only through the input or the bias.
        is_reached = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        keeps_factors = self.factors is not None and self.weight.requires_grad and is_reached
        if not keeps_factors or not torch.is_grad_enabled():
            return F.linear(x, weight, self.bias)
        out: Tensor = _LinearKeepingFactors.apply(x, weight.detach(), self.bias, self.factors, pooling)
        return out


class _LinearKeepingFactors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, factors: list[Factors], pooling: Tensor | None
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):  # cast once, for the backward pass too
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.factors, ctx.pooling = factors, pooling
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.factors.append(Factors(gradient, x.detach(), ctx.pooling))
        input_gradient = gradient @ weight if ctx.needs_input_grad[0] else None
        bias_gradient = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return input_gradient, None, bias_gradient, None, None


def factored_layers(model: nn.Module) -> list[FactoredLinear]:
    """Return the layers of a network that can store their gradients as factors, in the network's order."""
    return [module for module in model.modules() if isinstance(module, FactoredLinear)]


@contextmanager
def keeping_factors(layers: Sequence[FactoredLinear]) -> Iterator[None]:
    """Inside, gradients are stored as factors instead of in ``weight.grad``; they are discarded on exit.

    Args:
        layers: the layers whose weights' gradients are stored so; all others are unaffected.
    """
    for layer in layers:
        layer.factors = []
    try:
        yield
    finally:
        for layer in layers:
            layer.factors = None
