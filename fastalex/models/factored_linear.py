"""A fully connected layer that can leave its weight's gradient as two factors instead of their product.

Over a batch of N images the gradient is ``G.T @ X``, where G is the gradient of the layer's output, (N, out),
and X the layer's input, (N, in). AlexNet's two hidden layers have 55 million weights and 220 MB of gradient;
the factors of 128 images are 10 MB. They suffice for training: the gradient's norm follows from them, and
:func:`fastalex.kernels.factored_sgd` updates the weight without storing the product.

A *tap* takes G out of the backward pass: zeros that the layer adds to its output, whose gradient is the
output's. X is returned beside the output. The layer keeps no state while the network runs, so that
torch.compile takes the whole network as one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex.kernels.factored_sgd_reference import upsampled


class Tap(NamedTuple):
    """What a layer needs to leave its weight's gradient as factors.

    Attributes:
        zeros: zeros that require a gradient, ``(N, out_features)`` in the dtype of the layer's output.
        copy: the weight in that dtype, which the products then read; None to cast the weight.
    """

    zeros: Tensor
    copy: Tensor | None = None


@dataclass
class Factors:
    """The gradient of a layer's weight as factors, over a batch or a part of one.

    Attributes:
        output: gradient of the layer's output, ``(N, out_features)``.
        input: the layer's input, ``(N, in_features)``, or ``(N, channels * pixels)`` with ``pooling``.
        pooling: ``(pixels, pooled pixels)`` if the weight was pooled for this batch; the gradient of the
            layer's own weight is then each channel's pixels times this matrix. None if it was not.
        scale: factor of the product, fp32 ``()``; None means 1.
    """

    output: Tensor
    input: Tensor
    pooling: Tensor | None = None
    scale: Tensor | None = None

    def squared_norm(self) -> Tensor:
        """Return the square of the unscaled gradient's Frobenius norm, fp64 ``()``.

        ``|G.T X|^2 = trace(X.T G G.T X)``, which is the sum of the N^2 elements of ``(G G.T) * (X X.T)``.
        """
        # The elements cancel where the images' gradients do: in fp32 their sum could be negative. On a CPU
        # the products are fp64. On a GPU for games those would take a tenth of the step; there they are fp32,
        # whose products of halves are exact, and the result is too uncertain only where it is too small to
        # be clipped.
        wide = torch.float64 if self.output.device.type == "cpu" else torch.float32
        output, images = self.output.to(wide), upsampled(self.input.to(wide), self.pooling)
        products = (output @ output.t()).double() * (images @ images.t()).double()
        return products.sum().clamp(min=0.0)


class FactoredLinear(nn.Linear):
    """``nn.Linear`` that can leave its weight's gradient as factors.

    The arguments are those of ``nn.Linear``.

    Attributes:
        parts: the gradient's factors, one for each backward pass since the last step; what
            :attr:`gradient` sums. Like ``weight.grad``, the optimizer's ``zero_grad`` clears them.
        copy: the weight in the dtype of the products, which the optimizer keeps equal to the weight; None
            without.
    """

    parts: list[Factors]
    copy: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.parts = []
        self._copied_version = -1

    @property
    def is_trained(self) -> bool:
        """Whether training changes the weight. A bias shows the gradient scaler whether G is finite."""
        return self.weight.requires_grad and self.bias is not None and self.bias.requires_grad

    @property
    def gradient(self) -> Factors | None:
        """The sum of all backward passes, as one :class:`Factors`; None before the first pass."""
        if len(self.parts) > 1:
            output = torch.cat([part.output for part in self.parts])
            input = torch.cat([part.input for part in self.parts])
            self.parts[:] = [Factors(output, input, self.parts[0].pooling)]
        return self.parts[0] if self.parts else None

    def add_factors(self, output: Tensor, input: Tensor) -> None:
        """Add a backward pass to :attr:`gradient`.

        Args:
            output: the gradient of the tap's zeros.
            input: what the layer returned beside its output.
        """
        self.parts.append(Factors(output, input.flatten(1), self.pooling_of(input.shape)))

    def pooling_of(self, shape: torch.Size) -> Tensor | None:
        """The pooling matrix for an input of this shape; None where the weight is not pooled."""
        return None

    def updated_copy(self, dtype: torch.dtype) -> Tensor:
        """Return :attr:`copy` in this dtype, made anew if the weight has changed since it was written."""
        if self.copy is None or self.copy.dtype != dtype:
            self.copy = torch.empty_like(self.weight, dtype=dtype, requires_grad=False)
            self._copied_version = -1
        if self._copied_version != self.weight._version:
            self.copy.copy_(self.weight.detach())
            self.mark_copied()
        return self.copy

    def mark_copied(self) -> None:
        """Note that :attr:`copy` equals the weight."""
        self._copied_version = self.weight._version

    def tapped(self, x: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """Return what ``forward`` returns, and the input for :meth:`add_factors`.

        Args:
            x: ``(N, in_features)``.
            tap: receives the gradient of the output; the weight receives none.

        Returns:
            The output ``(N, out_features)`` and the input, detached, both in the dtype of the tap.
        """
        return self._tapped(x, self.weight.detach() if tap.copy is None else tap.copy, tap)

    def _tapped(self, x: Tensor, weight: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        x = x.to(tap.zeros.dtype)  # once, for both products and the factors
        return F.linear(x, weight.to(x.dtype), self.bias) + tap.zeros, x.detach()


def factored_layers(model: nn.Module) -> Sequence[FactoredLinear]:
    """Return the layers to tap, in the order of the taps that the network takes as its second argument.

    A network that takes taps has them as its attribute ``factored_layers``. It then returns its logits and a
    list with each tapped layer's second result.
    """
    layers: Sequence[FactoredLinear] = getattr(model, "factored_layers", ())
    return layers
