"""Networks in plain PyTorch: the same outputs and weights' names, without fastalex's kernels and layers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fastalex.errors import ConfigError
from fastalex.kernels import LocalResponseNorm
from fastalex.models import MODELS, plain_alexnet
from fastalex.models.alexnet import AlexNet


def plain_network(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Build the plain equivalent of a network, which takes its state dict.

    Args:
        name: one of ``MODELS``.
        num_classes: width of the output layer.
        options: those of :func:`fastalex.models.create_model`.

    Returns:
        The network, in fp32 on the CPU, with weights of its own. A network that is neither AlexNet nor built
        from fastalex's layers is its own equivalent.
    """
    if MODELS[name] is AlexNet:
        return plain_alexnet.AlexNet(**_alexnet_arguments(num_classes, **options))
    network = MODELS[name](num_classes=num_classes, **options)
    for layer in network.modules():
        if type(layer) is LocalResponseNorm:
            layer.__class__ = nn.LocalResponseNorm
    return network


def definition(name: str, num_classes: int, **options: Any) -> str:
    """Return Python source that defines ``network()``, which builds the plain equivalent of a network.

    AlexNet's needs nothing but torch, that of another network torchvision as well.

    Args:
        name: one of ``MODELS``.
        num_classes: width of the output layer.
        options: those of :func:`fastalex.models.create_model`.

    Raises:
        ConfigError: the network is not one of fastalex's or torchvision's, so its source is not known.
    """
    build = MODELS[name]
    arguments: dict[str, Any]
    if build is AlexNet:
        arguments = _alexnet_arguments(num_classes, **options)
        imports = "from collections import OrderedDict\n\nfrom torch import Tensor, nn\n"
        parts = [inspect.getsource(plain_alexnet.norm_pool), inspect.getsource(plain_alexnet.AlexNet)]
        call = plain_alexnet.AlexNet.__name__
    elif getattr(build, "__module__", "").startswith("torchvision.models."):
        arguments = {"num_classes": num_classes, **options}
        imports = "from torch import nn\nfrom torchvision import models\n"
        parts, call = [], f"models.{name}"
    else:
        raise ConfigError(
            f"format=state_dict: there is no plain definition of model.name={name}; choose onnx or pt2"
        )
    listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    parts.append(f"def network() -> nn.Module:\n    return {call}({listed})\n")
    return "\n\n".join([imports, *parts])


def _alexnet_arguments(
    num_classes: int, *, groups: int, norm: str, overlapping_pool: bool, dropout: float, init: str
) -> dict[str, Any]:
    """Return the plain AlexNet's arguments; how the weights were initialised is no matter any more."""
    return {
        "num_classes": num_classes,
        "groups": groups,
        "norm": norm,
        "pool": 3 if overlapping_pool else 2,
        "dropout": dropout,
    }
