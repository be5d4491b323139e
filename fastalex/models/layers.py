"""A network's layers by name: those that a prefix names, and the last one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have parameters or buffers of their own, by name, in the network's order.

    Args:
        model: the network.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        or any(True for _ in module.buffers(recurse=False))
    }


def layers_named(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the layers that a name or a prefix stands for; empty if there are none.

    ``features.1`` stands for the layer of that name and for those inside it, not for ``features.10``. A name
    that no layer and no part of the network has is a prefix: ``conv`` stands for ``conv1``, ``conv2`` and so
    on.

    Args:
        model: the network.
        name: the name or prefix.
    """
    known = layers(model)
    inside = {key: layer for key, layer in known.items() if key == name or key.startswith(f"{name}.")}
    return inside or {key: layer for key, layer in known.items() if name and key.startswith(name)}


def last_layer(model: nn.Module) -> str:
    """Return the name of the layer that computes the logits: the last one that has parameters.

    Args:
        model: the network.
    """
    return [name for name, layer in layers(model).items() if any(True for _ in layer.parameters())][-1]


def outline(model: nn.Module) -> list[str]:
    """Return names for a message: the network's parts, and those inside each ``nn.Sequential``.

    Args:
        model: the network.
    """
    return list(_parts(model))


def _parts(model: nn.Module) -> Iterator[str]:
    for name, part in model.named_children():
        if not layers(part):
            continue
        if isinstance(part, nn.Sequential):
            yield from (f"{name}.{inner}" for inner, module in part.named_children() if layers(module))
        else:
            yield name
