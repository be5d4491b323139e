"""The optimizer and its learning-rate schedules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.sgd import sgd
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastalex.config import Optimizer, Scaling, Schedule, TrainConfig
from fastalex.errors import MissingDependencyError
from fastalex.models.factored_linear import FactoredLinear, factored_layers

# Steps between two updates of the average: each reads and writes all weights, and few would do it no harm.
AVERAGE_EVERY = 8

# Rows of a factored gradient that are multiplied out together, 5 MB of AlexNet's largest: the fastest number
# in benchmarks/test_factored_sgd.py.
ROWS = 128

PLATEAU_FACTOR = 0.1
# The paper's run ended after three reductions; the fourth ends ours. (Half, because 0.1**3 is not exact.)
PLATEAU_FLOOR = 0.5 * PLATEAU_FACTOR**3


# The batch that train.lr is for, where it is scaled: the paper's.
LR_BATCH = 128


def learning_rate(config: TrainConfig) -> float:
    """The peak rate: ``train.lr``, or that in proportion to the batch.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017; the warm-up which that takes is the one cycle's.
    """
    return config.lr * _scale(config)


def _scale(config: TrainConfig) -> float:
    return 1.0 if config.lr_scaling is Scaling.none else config.batch_size / LR_BATCH


def _cycles(config: TrainConfig, steps: int) -> list[tuple[int, float]]:
    """The steps and the peak rate of each cycle; each stage with a rate ends one, and the run the last."""
    per_epoch = steps // config.epochs
    cycles, taken, epochs = [], 0, 0
    for stage in config.stages:
        epochs += stage.epochs
        if stage.lr is not None:
            cycles.append((per_epoch * epochs - taken, stage.lr * _scale(config)))
            taken = per_epoch * epochs
    return [*cycles, (steps - taken, learning_rate(config))]


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


class LearningRate:
    """A schedule that is told of every step and of every validation, whichever of the two it follows.

    Args:
        optimizer: whose rate is set.
        config: names the schedule: ``one_cycle`` rises linearly from ``lr / 25`` to ``lr`` over the first
            ``warmup`` of the steps and falls linearly to zero (Smith and Topin, "Super-Convergence", 2018),
            and does so anew after a stage with a rate of its own (the warm restart of Loshchilov and Hutter,
            "SGDR", 2017); ``plateau`` divides by ten when the validation error has not improved for more
            than ``patience`` epochs (Krizhevsky's rule, made automatic).
        steps: of the whole run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> None:
        self._optimizer = optimizer
        self._initial = learning_rate(config)
        self._warmup = config.warmup
        self._cycles = _cycles(config, steps) if config.schedule is Schedule.one_cycle else []
        self._scheduler: OneCycleLR | ReduceLROnPlateau
        if self._cycles:
            self._begin(0)
        else:
            self._scheduler = ReduceLROnPlateau(
                optimizer, factor=PLATEAU_FACTOR, patience=config.patience, threshold=0.0, eps=0.0
            )

    def _begin(self, cycle: int) -> None:
        """Begin a cycle, at its lowest rate."""
        # PyTorch's SequentialLR cannot do it: OneCycleLR keeps its bounds in the optimizer, the last one's in
        # place of the others'.
        steps, peak = self._cycles[cycle]
        self._cycle = cycle
        # PyTorch divides by the length of the rise, and ends it a step early: then it has none.
        warmup = 0.0 if self._warmup * (steps + 1) == 1 else self._warmup
        self._scheduler = OneCycleLR(
            self._optimizer,
            max_lr=peak,
            # One more than are taken: PyTorch's schedule reaches zero at its last step.
            total_steps=steps + 1,
            pct_start=warmup,
            anneal_strategy="linear",
            cycle_momentum=False,
        )

    @property
    def current(self) -> float:
        """The rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def exhausted(self) -> bool:
        """Whether a plateau schedule has made its last reduction."""
        return isinstance(self._scheduler, ReduceLROnPlateau) and self.current < self._initial * PLATEAU_FLOOR

    def after_step(self) -> None:
        if not isinstance(self._scheduler, OneCycleLR):
            return
        self._scheduler.step()
        ended = self._scheduler.last_epoch == self._cycles[self._cycle][0]
        if ended and self._cycle + 1 < len(self._cycles):
            self._begin(self._cycle + 1)

    def after_validation(self, error: float) -> None:
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(error)

    def state_dict(self) -> dict:
        state = self._scheduler.state_dict()
        return state | {"cycle": self._cycle} if self._cycles else state

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state; the optimizer's, with the rate, has to be loaded already."""
        state = dict(state)
        cycle = state.pop("cycle", 0)
        if self._cycles and cycle != self._cycle:
            groups = [dict(group) for group in self._optimizer.param_groups]
            self._begin(cycle)
            for group, loaded in zip(self._optimizer.param_groups, groups, strict=True):
                group.update(loaded)
        self._scheduler.load_state_dict(state)


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
