"""Layers that keep their weights while the others are trained."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastalex.config import TrainConfig
from fastalex.errors import ConfigError
from fastalex.models.layers import last_layer, layers_named, outline


def freeze(model: nn.Module, config: TrainConfig) -> None:
    """Exclude the layers of ``train.freeze`` from training: their parameters need no gradient from then on.

    Call it before a network is divided over ranks and before its optimizer is created, which then holds the
    other parameters only.

    Args:
        model: the network; it is changed.
        config: the recipe; ``freeze`` and ``head_lr`` are used.

    Raises:
        ConfigError: a name stands for no layer; nothing would be left to train; or the last layer is frozen
            and has a learning rate of its own.
    """
    for name in config.freeze:
        frozen = layers_named(model, name)
        if not frozen:
            raise ConfigError(
                f"train.freeze={name}: the network has no such layer; choose from {', '.join(outline(model))}"
            )
        for layer in frozen.values():
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
    last = last_layer(model)
    names = ",".join(config.freeze)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"train.freeze=[{names}]: freezes every layer, so there is nothing to train; "
            f"leave out the last one, {last}"
        )
    if config.head_lr is not None and is_frozen(model, last, config):
        raise ConfigError(
            f"train.head_lr={config.head_lr}: is the learning rate of the last layer, {last}, which "
            f"train.freeze=[{names}] freezes; leave out one of the two"
        )


def is_frozen(model: nn.Module, layer: str, config: TrainConfig) -> bool:
    """Whether ``train.freeze`` names a layer.

    Args:
        model: the network.
        layer: name of the layer.
        config: the recipe.
    """
    return any(layer in layers_named(model, name) for name in config.freeze)


def frozen_norms(model: nn.Module, config: TrainConfig) -> list[nn.Module]:
    """Return the batch normalisations in frozen layers, which keep their statistics in training.

    Args:
        model: the network, as it is trained.
        config: the recipe.
    """
    frozen = [layers_named(model, name).values() for name in config.freeze]
    return [layer for each in frozen for layer in each if isinstance(layer, _BatchNorm)]
