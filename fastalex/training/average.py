"""The moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

# Steps between two updates of the average. Each update reads and writes all weights. Updating the average
# less often would not hurt it.
AVERAGE_EVERY = 8


class WeightAverage:
    """An exponential moving average of a network's weights and buffers (Polyak and Juditsky, 1992).

    Args:
        model: the network whose weights are averaged; it is copied.
        decay: fraction of the old average that remains after one step, 0 to 1. The average spans about
            ``1 / (1 - decay)`` steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._averaged = copy.deepcopy(model)
        self._started = False
        self._mix = get_ema_multi_avg_fn(decay**AVERAGE_EVERY)

    # Not PyTorch's AveragedModel: it counts updates in a tensor, which the host waits for in each update.
    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the average in every :data:`AVERAGE_EVERY`-th step.

        Args:
            step: number of the step that was just taken, from 1.
        """
        if step % AVERAGE_EVERY:
            return
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for pair in zip(_tensors(self._averaged), _tensors(self._model), strict=True):
            by_dtype.setdefault(pair[0].dtype, []).append(pair)
        for pairs in by_dtype.values():
            averages, currents = (list(tensors) for tensors in zip(*pairs, strict=True))
            if self._started:
                self._mix(averages, currents, 0)
            else:
                torch._foreach_copy_(averages, currents)
        self._started = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the network has the averaged weights, or its own before the first update."""
        if not self._started:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Swap values, not tensors: the optimizer and a compiled network refer to the tensors.
        averaged = self._averaged.state_dict()
        for name, tensor in self._model.state_dict().items():
            current = tensor.clone()
            tensor.copy_(averaged[name])
            averaged[name].copy_(current)

    @property
    def weights(self) -> dict[str, torch.Tensor] | None:
        """The state dict of the average; None before the first update."""
        return self._averaged.state_dict() if self._started else None

    def load(self, weights: dict[str, torch.Tensor] | None) -> None:
        """Restore an average.

        Args:
            weights: what :attr:`weights` returned; None leaves this average as it is.
        """
        if weights is not None:
            self._averaged.load_state_dict(weights)
            self._started = True


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield a network's parameters and buffers, detached, without copying them."""
    return (tensor.detach() for tensor in chain(model.parameters(), model.buffers()))
