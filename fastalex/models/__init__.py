"""Networks by name: AlexNet and its variants, and the torchvision networks it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn

from fastalex.errors import CheckpointError, ConfigError
from fastalex.models.alexnet import AlexNet
from fastalex.models.four_layer import FourLayer
from fastalex.models.winograd import allow_winograd

__all__ = [
    "MODELS",
    "AlexNet",
    "check_batch",
    "check_crop",
    "count_parameters",
    "create_model",
    "load_weights",
    "smallest_crop",
]

# Each callable returns a network; it takes num_classes and the network's options as keywords. Two optional
# attributes of the callable state the network's limits:
#   min_crop: the smallest crop that the network can compute, in pixels.
#   trains_on_one_image: whether it can train on one image of min_crop pixels. Batch normalisation cannot if
#       the image is reduced to one value per channel.
# The defaults hold for torchvision's networks, which halve the image five times and normalise to the end.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "four_layer": FourLayer,
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
}
_MIN_CROP = 32
_TRAINS_ON_ONE_IMAGE = False


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build a network with freshly initialised weights, in fp32 on the CPU.

    Args:
        name: one of ``MODELS``.
        num_classes: width of the output layer; at least 1.
        options: keyword arguments of the network, such as ``norm="batch"`` of :class:`AlexNet`.

    Raises:
        ConfigError: if there is no such network, or it has no such option.
    """
    build = _find(name)
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes}: a network needs at least one class")
    try:
        model = build(num_classes=num_classes, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"model.name={name}: no such option ({error})") from error
    return allow_winograd(model)


def check_crop(name: str, key: str, crop: int) -> None:
    """Refuse a crop that is too small for the network.

    Args:
        name: one of ``MODELS``.
        key: the configuration key that holds the crop, for the message.
        crop: side of the crop, in pixels.

    Raises:
        ConfigError: if the crop is too small, naming the smallest that works; or if there is no such network.
    """
    smallest = smallest_crop(name)
    if crop < smallest:
        raise ConfigError(f"{key}={crop}: {name} needs a crop of at least {smallest}")


def check_batch(name: str, images: int, crop: int) -> None:
    """Refuse to train on one image at a time where batch normalisation would see one value per channel.

    Args:
        name: one of ``MODELS``.
        images: images per forward pass: the batch, or one of the parts it is accumulated from.
        crop: side of the smallest crop of the run, in pixels.

    Raises:
        ConfigError: naming the keys to change; or if there is no such network.
    """
    trains_on_one_image = getattr(_find(name), "trains_on_one_image", _TRAINS_ON_ONE_IMAGE)
    if images == 1 and crop <= smallest_crop(name) and not trains_on_one_image:
        raise ConfigError(
            f"train.batch_size: {name} gets one image at a time, a crop of {crop} leaves one pixel of it, "
            "and batch normalisation takes two; raise train.batch_size, or lower train.accumulate"
        )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy a state dict into a network of the same architecture.

    Args:
        model: the network, on any device.
        weights: tensors by name, as ``model.state_dict()`` returns them.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        ours, theirs = (
            tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (expected, weights)
        )
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint is of another architecture: {name} is {theirs} there and {ours} in "
                "the network asked for"
            )
    model.load_state_dict(weights)


def smallest_crop(name: str) -> int:
    """Return the side of the smallest crop that a network takes, in pixels.

    Args:
        name: one of ``MODELS``.

    Raises:
        ConfigError: if there is no such network.
    """
    return getattr(_find(name), "min_crop", _MIN_CROP)


def _find(name: str) -> Callable[..., nn.Module]:
    if name not in MODELS:
        raise ConfigError(f"model.name={name}: no such network; choose from {', '.join(MODELS)}")
    return MODELS[name]
