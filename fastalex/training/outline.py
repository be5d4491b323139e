"""A copy of a network without memory for its weights, to count what a training step takes."""

from __future__ import annotations

import copy

import torch
from torch import nn


def outline(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a network on the meta device.

    Its batch normalisation does not compute statistics: those of a single image, which a rank may have where
    several ranks share them, would be refused.

    Args:
        model: the network, on any device.
        dtype: of the copy's weights.
    """
    network = copy.deepcopy(model).to("meta", dtype)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    return network
