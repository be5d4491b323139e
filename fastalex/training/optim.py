"""The optimizers, and the moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastalex.config import Optimizer, TrainConfig
from fastalex.errors import MissingDependencyError
from fastalex.kernels.factored_sgd import factored_sgd
from fastalex.models.factored_linear import FactoredLinear, factored_layers
from fastalex.models.layers import last_layer
from fastalex.training.schedule import head_learning_rate, learning_rate

# Steps between two updates of the average. Each update reads and writes all weights. Updating the average
# less often would not hurt it.
AVERAGE_EVERY = 8


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create SGD with momentum and weight decay, or timm's LARS (You, Gitman and Ginsburg, 2017).

    SGD uses PyTorch's fused kernel, which updates a parameter in one pass over memory. Sharded parameters
    form a second group, because there is no fused kernel for them. With ``head_lr`` the last layer's form a
    group as well. Frozen parameters are in no group.

    Args:
        model: the network whose parameters are updated, except those that need no gradient.
        config: the recipe; ``optimizer``, ``lr``, ``head_lr``, ``momentum`` and ``weight_decay`` are used.

    Raises:
        MissingDependencyError: LARS without timm.
    """
    rate, head_rate = learning_rate(config), head_learning_rate(config)
    head = [] if config.head_lr is None else list(model.get_submodule(last_layer(model)).parameters())
    apart = set(head)
    parameters = [p for p in model.parameters() if p.requires_grad and p not in apart]
    if config.optimizer is Optimizer.lars:
        try:
            from timm.optim import Lars
        except ImportError as error:
            raise MissingDependencyError("train.optimizer=lars needs timm: pip install timm") from error
        # timm adapts the rate only in groups with weight decay; biases take the plain step, as usual.
        groups: list[dict[str, Any]] = []
        for members, lr in ((parameters, rate), (head, head_rate)) if head else ((parameters, rate),):
            decaying = [p for p in members if p.ndim > 1]
            plain = [p for p in members if p.ndim <= 1]
            groups.append({"params": decaying, "lr": lr, "weight_decay": config.weight_decay})
            groups.append({"params": plain, "lr": lr, "weight_decay": 0.0})
        lars: torch.optim.Optimizer = Lars(groups, lr=rate, momentum=config.momentum)
        return lars
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    groups = [{"params": replicated, "fused": True}]
    if sharded:
        groups.append({"params": sharded, "fused": False, "foreach": True})
    if head:
        groups.append({"params": head, "fused": True, "lr": head_rate})
    return FactoredSGD(
        groups,
        factored_layers(model),
        lr=rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


class FactoredSGD(torch.optim.SGD):
    """Fused SGD that also applies gradients which layers keep as factors.

    Args:
        groups: parameter groups, as :class:`torch.optim.SGD` takes them, each with ``fused``.
        layers: the layers that may leave their gradients as factors.
        lr: learning rate, a factor of the whole step.
        momentum: fraction of the last step's velocity that the next one keeps, 0 to 1; 0 keeps no velocity.
        weight_decay: multiple of the weight that is added to its gradient.
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
        # PyTorch sets this only if `fused` is given for all groups at once. With it, GradScaler passes the
        # kernel a flag on the device for overflow; without it, the host waits for that flag in each step.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)
        self._layers = layers
        # Allocate the momentum now: in the first step it would lie among activations and fragment memory.
        # Allocate it for all parameters, since PyTorch's fused step needs all buffers or none.
        for group in self.param_groups:
            for parameter in group["params"] if group["fused"] else ():
                self._momentum(parameter)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": self._layers}

    def _momentum(self, weight: Tensor) -> Tensor | None:
        """Return the weight's momentum buffer, created as zeros; None without momentum."""
        if not self.param_groups[0]["momentum"]:
            return None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update each parameter from its ``grad``, and weights of layers with factors from those.

        Args:
            closure: recomputes the loss, as in :meth:`torch.optim.SGD.step`.

        Returns:
            The closure's loss; None without a closure.
        """
        loss = super().step(closure)
        # A gradient scaler sets these for the step: the factor of the loss, unless the gradients have been
        # divided by it, and whether a gradient is infinite or NaN, in which case nothing may change.
        loss_scale: Tensor | None = getattr(self, "grad_scale", None)
        skip: Tensor | None = getattr(self, "found_inf", None)
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for layer in self._layers:
            gradient = layer.gradient
            if gradient is None:
                continue
            group = groups[layer.weight]
            scale = gradient.scale
            if loss_scale is not None:
                scale = loss_scale.reciprocal() if scale is None else scale / loss_scale
            factored_sgd(
                layer.weight,
                self._momentum(layer.weight),
                gradient.output,
                gradient.input,
                rate=_rate(group["lr"], layer.weight.device),
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                pooling=gradient.pooling,
                scale=scale,
                skip=skip,
                copy=layer.copy,
            )
            if layer.copy is not None:
                layer.mark_copied()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and those that layers keep as factors."""
        super().zero_grad(set_to_none)
        for layer in self._layers:
            layer.parts.clear()


def _rate(rate: float | Tensor, device: torch.device) -> Tensor:
    """Return a learning rate as a tensor ``()``, in fp64 on a CPU, which reads it back."""
    if isinstance(rate, Tensor):
        return rate
    return torch.full((), rate, dtype=torch.float64 if device.type == "cpu" else None, device=device)


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
