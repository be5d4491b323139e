"""The optimizer, and the average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastalex.config import Optimizer, TrainConfig
from fastalex.errors import MissingDependencyError
from fastalex.models.factored_linear import FactoredLinear, factored_layers
from fastalex.training.schedule import learning_rate

# Steps between two updates of the average: each reads and writes all weights, and few would do it no harm.
AVERAGE_EVERY = 8

# Rows of a factored gradient that are multiplied out together, 5 MB of AlexNet's largest: the fastest number
# in benchmarks/test_factored_sgd.py.
ROWS = 128


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay, or LARS (You, Gitman and Ginsburg, 2017), which is timm's.

    SGD's fused kernel updates a parameter in one pass over memory. Parameters that are divided over processes
    are a group of their own: there is no such kernel for them.

    Raises:
        MissingDependencyError: LARS without timm.
    """
    rate = learning_rate(config)
    parameters = list(model.parameters())
    if config.optimizer is Optimizer.lars:
        try:
            from timm.optim import Lars
        except ImportError as error:
            raise MissingDependencyError("train.optimizer=lars needs timm: pip install timm") from error
        # timm adapts the rate of groups with weight decay; biases take the plain step, as is usual.
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        lars: torch.optim.Optimizer = Lars(groups, lr=rate, momentum=config.momentum)
        return lars
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    divided = [p for p in parameters if isinstance(p, DTensor)]
    groups = [{"params": whole, "fused": True}]
    if divided:
        groups.append({"params": divided, "fused": False, "foreach": True})
    return FactoredSGD(
        groups,
        factored_layers(model),
        lr=rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


class FactoredSGD(torch.optim.SGD):
    """SGD, fused, that also steps with the gradients that layers keep as factors.

    Args:
        groups: of parameters.
        layers: whose weights are among the first group's.
        lr: as the next two of :class:`torch.optim.SGD`.
        momentum:
        weight_decay:
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        layers: Sequence[FactoredLinear],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
        # PyTorch sets it where `fused` is given for all groups at once. It has GradScaler tell the kernel
        # whether a gradient overflowed; without, the host waits to be told, in each step.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)
        self._layers = layers
        # Now, and not in the first step: among its activations they would be in the way of later ones. All of
        # them, since PyTorch's fused step takes either all of the buffers or none.
        for parameter in self.param_groups[0]["params"]:
            self._momentum(parameter)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": self._layers}

    def _momentum(self, weight: Tensor) -> Tensor | None:
        """Return the weight's buffer, zeros to begin with; None without momentum."""
        if not self.param_groups[0]["momentum"]:
            return None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step: with ``grad`` where there is one, with ``factors`` where a layer has some."""
        loss = super().step(closure)
        group = self.param_groups[0]
        for layer in self._layers:
            gradient = layer.gradient
            if gradient is None:
                continue
            momentum = self._momentum(layer.weight)
            for start in range(0, layer.out_features, ROWS):
                stop = min(start + ROWS, layer.out_features)
                sgd(
                    [layer.weight[start:stop]],
                    [gradient.rows(start, stop)],
                    [None if momentum is None else momentum[start:stop]],
                    fused=True,
                    weight_decay=group["weight_decay"],
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                )
        return loss


class WeightAverage:
    """An exponential moving average of a network's weights and buffers (Polyak and Juditsky, 1992).

    Args:
        model: whose weights are averaged.
        decay: the share of the old average that a step leaves; the average spans about ``1 / (1 - decay)``
            steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._averaged = copy.deepcopy(model)
        self._begun = False
        self._mix = get_ema_multi_avg_fn(decay**AVERAGE_EVERY)

    # Not PyTorch's AveragedModel: it counts its updates in a tensor, and the host waits for it in each.
    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take the weights after step number ``step``, counted from 1, into the average."""
        if step % AVERAGE_EVERY:
            return
        alike: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for pair in zip(_tensors(self._averaged), _tensors(self._model), strict=True):
            alike.setdefault(pair[0].dtype, []).append(pair)
        for pairs in alike.values():
            averages, currents = (list(tensors) for tensors in zip(*pairs, strict=True))
            if self._begun:
                self._mix(averages, currents, 0)
            else:
                torch._foreach_copy_(averages, currents)
        self._begun = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the network's weights for their average, once there is one, and back at the end."""
        if not self._begun:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Values, not tensors: the optimizer, and a compiled network, hold the tensors.
        averaged = self._averaged.state_dict()
        for name, tensor in self._model.state_dict().items():
            held = tensor.clone()
            tensor.copy_(averaged[name])
            averaged[name].copy_(held)

    @property
    def weights(self) -> dict[str, torch.Tensor] | None:
        """The state dict of the average; None before the first update."""
        return self._averaged.state_dict() if self._begun else None

    def load(self, weights: dict[str, torch.Tensor] | None) -> None:
        """Go on from an average that another process kept."""
        if weights is not None:
            self._averaged.load_state_dict(weights)
            self._begun = True


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield a network's weights and buffers, as they are."""
    return (tensor.detach() for tensor in chain(model.parameters(), model.buffers()))
