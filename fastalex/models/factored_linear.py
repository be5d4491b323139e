"""A fully connected layer that can keep its weight's gradient as the two factors it is the product of.

Over a batch of N images that gradient is ``G.T @ X``: G the gradient of the layer's output, (N, out), X its
input, (N, in). AlexNet's two hidden layers have 55 million weights and 220 MB of gradient; the factors of 128
images are 10 MB. What training asks of a gradient it can have from them: its norm, and an update, a few rows
at a time.
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
    """A gradient, or a part of a batch's share of one.

    Attributes:
        output: gradient of the layer's output, ``(N, out_features)``.
        input: of the layer, ``(N, channels * pixels)``.
        pooling: ``(pixels, pooled)`` where the layer's weight was pooled, and the gradient is of what it
            was pooled from: each channel's pixels times this matrix. None elsewhere.
        scale: by which the product is multiplied, ``()``; None for one.
    """

    output: Tensor
    input: Tensor
    pooling: Tensor | None = None
    scale: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of the gradient, fp32 or wider, ``(stop - start, in_features)``."""
        product = self.output[:, start:stop].t() @ self.input
        product = product.to(torch.promote_types(product.dtype, torch.float32))
        return self._pooled_up(product if self.scale is None else product.mul_(self.scale))

    def squared_norm(self) -> Tensor:
        """Return the square of the unscaled gradient's Frobenius norm, in fp64.

        ``|G.T X|^2 = trace(X.T G G.T X)``, which is the sum over the N^2 elements of ``(G G.T) * (X X.T)``.
        They cancel where the images' gradients do: a sum in fp32 could come out below zero.
        """
        output, images = self.output.double(), self._pooled_up(self.input.double())
        return ((output @ output.t()) * (images @ images.t())).sum().clamp(min=0.0)

    def _pooled_up(self, rows: Tensor) -> Tensor:
        if self.pooling is None:
            return rows
        pooling = self.pooling.to(rows.dtype)
        return (rows.view(-1, len(pooling)) @ pooling).view(len(rows), -1)


class FactoredLinear(nn.Linear):
    """``nn.Linear``, but for its weight's gradient within :func:`keeping_factors`.

    Attributes:
        factors: None where the gradient goes to ``weight.grad``, as everywhere; else the list to which each
            backward pass adds its own.
    """

    factors: list[Factors] | None = None

    @property
    def gradient(self) -> Factors | None:
        """What backward passes have added up to; None before the first."""
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
        """Return ``x @ weight.T + bias``, for a weight that is the layer's own, or that was pooled from it.

        Args:
            x: ``(N, features)``.
            weight: ``(out_features, features)``.
            pooling: of :class:`Factors`.
        """
        # The weight has to be detached, so something else must have autograd come back to this layer.
        reached = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        keeps = self.factors is not None and self.weight.requires_grad and reached
        if not keeps or not torch.is_grad_enabled():
            return F.linear(x, weight, self.bias)
        out: Tensor = _LinearKeepingFactors.apply(x, weight.detach(), self.bias, self.factors, pooling)
        return out


class _LinearKeepingFactors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, factors: list[Factors], pooling: Tensor | None
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):  # once: the backward pass multiplies by the rounded weight too
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
        of_input = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return of_input, None, of_bias, None, None


def factored_layers(model: nn.Module) -> list[FactoredLinear]:
    """Return the model's layers that can keep factors."""
    return [module for module in model.modules() if isinstance(module, FactoredLinear)]


@contextmanager
def keeping_factors(layers: Sequence[FactoredLinear]) -> Iterator[None]:
    """Context in which the layers' weights get no ``grad``, but the layers factors, forgotten at its end."""
    for layer in layers:
        layer.factors = []
    try:
        yield
    finally:
        for layer in layers:
            layer.factors = None
