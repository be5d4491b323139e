"""Training whose wide fully connected layers leave their weights' gradients as factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastalex.models.factored_linear import FactoredLinear, Tap, factored_layers
from fastalex.runtime import Runtime


class Taps:
    """Taps for the batches of a network, and what becomes of their gradients.

    Args:
        model: the network, which takes taps (:func:`fastalex.models.factored_linear.factored_layers`).
        template: the same network on the meta device.
        runtime: the device and dtype of the network's products.
        copies: whether the optimizer keeps a copy of each weight in that dtype for the products, where it
            differs from the weight's.
    """

    def __init__(self, model: nn.Module, template: nn.Module, runtime: Runtime, *, copies: bool) -> None:
        # None for a layer that is not trained: it gets no tap.
        self._layers = [layer if layer.is_trained else None for layer in factored_layers(model)]
        self._template = template
        self._runtime = runtime
        self._copies = copies and runtime.dtype != torch.float32
        self._zeros: dict[int, list[Tensor]] = {}  # by the number of images
        self._reads_copy: dict[torch.Size, list[bool]] = {}  # of each layer, by the shape of an image

    def __bool__(self) -> bool:
        """Whether there is a layer to tap."""
        return any(self._layers)

    def of(self, shape: torch.Size) -> list[Tap | None]:
        """Return the taps for a batch; those of the last call with as many images are used again.

        Args:
            shape: of the batch, ``(N, 3, crop, crop)``.
        """
        count, image = shape[0], shape[1:]
        if image not in self._reads_copy:
            self._reads_copy[image] = self._layers_that_read_copies(image)
        if count not in self._zeros:
            self._zeros[count] = [self._new_zeros(count, layer) for layer in self._layers if layer]
        zeros = iter(self._zeros[count])
        taps: list[Tap | None] = []
        for layer, reads_copy in zip(self._layers, self._reads_copy[image], strict=True):
            if layer is None:
                taps.append(None)
                continue
            if not reads_copy:
                layer.copy = None  # which the optimizer would write for nothing
            copy = self._runtime.static(layer.updated_copy(self._runtime.dtype)) if reads_copy else None
            taps.append(Tap(next(zeros), copy))
        return taps

    def collect(self, taps: Sequence[Tap | None], inputs: Sequence[Tensor]) -> None:
        """Give each layer the factors of a backward pass.

        Args:
            taps: what :meth:`of` returned.
            inputs: what the network returned beside its logits.
        """
        seen = iter(inputs)
        for layer, tap in zip(self._layers, taps, strict=True):
            if layer is not None and tap is not None:
                assert tap.zeros.grad is not None
                layer.add_factors(tap.zeros.grad, next(seen))
                tap.zeros.grad = None

    def _new_zeros(self, count: int, layer: FactoredLinear) -> Tensor:
        # Without autocast, which fp32 has none of, a product has the weight's dtype.
        dtype = layer.weight.dtype if self._runtime.dtype == torch.float32 else self._runtime.dtype
        zeros = torch.zeros(count, layer.out_features, dtype=dtype, device=self._runtime.device)
        return self._runtime.static(zeros).requires_grad_()

    def _layers_that_read_copies(self, image: torch.Size) -> list[bool]:
        """Return for each layer whether its products read the whole weight, and not one pooled from it."""
        if not self._copies:
            return [False] * len(self._layers)
        with torch.device("meta"):
            taps = [Tap(torch.zeros(1, layer.out_features)) for layer in factored_layers(self._template)]
            _, inputs = self._template(torch.empty(1, *image), taps)
        return [seen.dim() == 2 for seen in inputs]
