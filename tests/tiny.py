"""A network of a few hundred weights, with all that has a state: batch normalisation, dropout, momentum."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastalex.models import MODELS


class Tiny(nn.Sequential):
    """What ``files/checkpoint_v1.pt`` has the weights of."""

    def __init__(self, num_classes: int, dropout: float = 0.25) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(16, num_classes),
        )


def register(dropout: float = 0.25) -> None:
    """Have ``model.name=tiny`` name it, in this process."""
    MODELS["tiny"] = partial(Tiny, dropout=dropout)
