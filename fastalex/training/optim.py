"""Which optimizer updates which parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastalex.config import Optimizer, TrainConfig
from fastalex.distributed.processes import ALONE, World
from fastalex.errors import MissingDependencyError
from fastalex.models.factored_linear import factored_layers
from fastalex.models.layers import last_layer
from fastalex.training.factored_sgd import FactoredSGD
from fastalex.training.muon import Muon
from fastalex.training.schedule import head_learning_rate, learning_rate, muon_learning_rate


def create_optimizer(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32, world: World = ALONE
) -> torch.optim.Optimizer:
    """Create SGD with momentum and weight decay; Muon; or timm's LARS (You, Gitman and Ginsburg, 2017).

    SGD uses PyTorch's fused kernel, which updates a parameter in one pass over memory. Sharded parameters
    form a second group, because there is no fused kernel for them. With ``head_lr`` the last layer's form a
    group as well, and with Muon the weights of convolutions. Frozen parameters are in no group.

    Args:
        model: the network whose parameters are updated, except those that need no gradient.
        config: the recipe; ``optimizer``, ``lr``, ``head_lr``, ``momentum``, ``weight_decay``,
            ``muon_lr`` and ``muon_weight_decay`` are used.
        dtype: dtype of Muon's matrix products, as in :class:`Muon`.
        world: the ranks that train together.

    Raises:
        MissingDependencyError: LARS without timm.
    """
    rate, head_rate = learning_rate(config), head_learning_rate(config)
    head = [] if config.head_lr is None else list(model.get_submodule(last_layer(model)).parameters())
    apart: set[Tensor] = set(head)
    convolutions = _convolutions(model, apart) if config.optimizer is Optimizer.muon else []
    apart.update(layer.weight for layer in convolutions)
    parameters = [p for p in model.parameters() if p.requires_grad and p not in apart]
    if config.optimizer is Optimizer.lars:
        return _lars(config, parameters, head)
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    groups: list[dict[str, Any]] = [{"params": replicated, "fused": True}]
    if sharded:
        groups.append({"params": sharded, "fused": False, "foreach": True})
    if head:
        groups.append({"params": head, "fused": True, "lr": head_rate})
    layers = factored_layers(model)
    sgd = {"lr": rate, "momentum": config.momentum, "weight_decay": config.weight_decay}
    if not convolutions:
        return FactoredSGD(groups, layers, **sgd)
    muon = {"muon_lr": muon_learning_rate(config), "muon_weight_decay": config.muon_weight_decay}
    return Muon(groups, layers, convolutions, **sgd, **muon, dtype=dtype, world=world)


def _convolutions(model: nn.Module, apart: set[Tensor]) -> list[nn.Conv2d]:
    """Return the convolutions whose weights are trained and not among ``apart``."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return [layer for layer in layers if layer.weight.requires_grad and layer.weight not in apart]


def _lars(
    config: TrainConfig, parameters: list[nn.Parameter], head: list[nn.Parameter]
) -> torch.optim.Optimizer:
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise MissingDependencyError("train.optimizer=lars needs timm: pip install timm") from error
    rate, head_rate = learning_rate(config), head_learning_rate(config)
    # timm adapts the rate only in groups with weight decay; biases take the plain step, as usual.
    groups: list[dict[str, Any]] = []
    for members, lr in ((parameters, rate), (head, head_rate)) if head else ((parameters, rate),):
        decaying = [p for p in members if p.ndim > 1]
        plain = [p for p in members if p.ndim <= 1]
        groups.append({"params": decaying, "lr": lr, "weight_decay": config.weight_decay})
        groups.append({"params": plain, "lr": lr, "weight_decay": 0.0})
    lars: torch.optim.Optimizer = Lars(groups, lr=rate, momentum=config.momentum)
    return lars
