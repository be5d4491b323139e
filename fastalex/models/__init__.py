"""Networks by name: AlexNet and its variants from here, the networks it is compared with from torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn

from fastalex.errors import CheckpointError, ConfigError
from fastalex.models.alexnet import MIN_CROP, AlexNet
from fastalex.models.winograd import allow_winograd

__all__ = [
    "MODELS",
    "AlexNet",
    "check_batch",
    "check_crop",
    "count_parameters",
    "create_model",
    "load_weights",
]

SMALLEST = 32  # crop: torchvision's networks halve it five times
MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
}


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build a network with freshly initialised weights, in fp32 on the CPU.

    Args:
        name: one of ``MODELS``.
        num_classes: width of the output layer; at least 1.
        options: keyword arguments of the network, such as ``norm="batch"`` of :class:`AlexNet`.

    Raises:
        ConfigError: if there is no such network, or it has no such option.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name={name}: no such network; choose from {', '.join(MODELS)}")
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes}: a network needs at least one class")
    try:
        model = MODELS[name](num_classes=num_classes, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"model.name={name}: no such option ({error})") from error
    return allow_winograd(model)


def check_crop(name: str, key: str, crop: int) -> None:
    """Refuse a crop, in pixels, from which the network computes nothing.

    Args:
        name: of the network.
        key: that has the crop.
        crop: its value.

    Raises:
        ConfigError: naming the smallest crop that works.
    """
    smallest = MIN_CROP if name == "alexnet" else SMALLEST
    if crop < smallest:
        raise ConfigError(f"{key}={crop}: {name} needs a crop of at least {smallest}")


def check_batch(name: str, images: int, crop: int) -> None:
    """Refuse a single image at a time where batch normalisation would have one value to normalise.

    Args:
        name: of the network.
        images: of a batch, or of the parts that it is divided into.
        crop: the smallest one, in pixels.

    Raises:
        ConfigError: naming the keys.
    """
    if images == 1 and crop <= SMALLEST and name != "alexnet":  # which has enough pixels at any crop
        raise ConfigError(
            f"train.batch_size: {name} gets one image at a time, a crop of {crop} leaves one pixel of it, "
            "and batch normalisation takes two; raise train.batch_size, or lower train.accumulate"
        )


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy a state dict into a network of the same architecture.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        ours = tuple(expected[name].shape) if name in expected else None
        theirs = tuple(weights[name].shape) if name in weights else None
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint is of another architecture: {name} is {theirs or 'absent'} there and "
                f"{ours or 'absent'} in the network asked for"
            )
    model.load_state_dict(weights)
