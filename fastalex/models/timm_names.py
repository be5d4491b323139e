"""timm's names for the layers of MobileNetV3 and EfficientNet, which torchvision names otherwise.

timm's ResNets have torchvision's names already.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

# timm's names in the order in which the layers compute, which is that of torchvision's modules: around the
# blocks, and in a block with an expansion, without one, and of a convolution alone.
_AROUND = ("conv_stem", "bn1", "blocks", "conv_head", "bn2", "classifier")
_EXPANDING = ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3")
_SEPARABLE = ("conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2")
_PLAIN = ("conv", "bn1")
_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(.+)")


def renamed_from_timm(weights: dict[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor] | None:
    """Rename the tensors of timm's MobileNetV3 or EfficientNet as torchvision does.

    Layers are paired in the order in which they compute; the shapes are the caller's to compare. Files in the
    safetensors format have lost the order of their tensors, so it is that of timm's names.

    Args:
        weights: a state dict.
        layers: names of torchvision's layers, in the network's order.

    Returns:
        The renamed state dict; None if it is not one of those networks, or has another number of layers.
    """
    if "conv_stem.weight" not in weights:
        return None
    theirs = {name.rpartition(".")[0] for name in weights}
    try:
        ordered = sorted(theirs, key=lambda layer: _position(layer, theirs))
    except ValueError:
        return None
    if "classifier" not in theirs:  # saved without a last layer
        ordered.append("classifier")
    if len(ordered) != len(layers):
        return None
    names = dict(zip(ordered, layers, strict=True))
    parts = {name: name.rpartition(".") for name in weights}
    return {f"{names[layer]}.{leaf}": weights[name] for name, (layer, _, leaf) in parts.items()}


def _position(layer: str, layers: set[str]) -> tuple[int, ...]:
    """Return the place of a layer in the network's order.

    Raises:
        ValueError: there is no such layer in these networks.
    """
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return (_AROUND.index(layer),)
    stage, block, name = match.groups()
    inside = f"blocks.{stage}.{block}."
    order: tuple[str, ...] = _EXPANDING if f"{inside}conv_pwl" in layers else _SEPARABLE
    if f"{inside}conv" in layers:
        order = _PLAIN
    return _AROUND.index("blocks"), int(stage), int(block), order.index(name)
