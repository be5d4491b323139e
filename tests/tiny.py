"""A network of a few hundred weights, with all that has a state: batch normalisation, dropout, momentum."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor, nn

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


class Interruptible(Tiny):
    """The tiny network with slow training steps, which use no processor, and checkpoints of 19 MB.

    So there is time to interrupt a run, and to interrupt it while it writes.
    """

    seconds = 0.05  # that a training step takes, at least

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.ballast = nn.Parameter(torch.randn(1_500_000))  # with its momentum and its average, 18 MB

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.seconds)
        return super().forward(x) * (1 + self.ballast.mean())


def register(dropout: float = 0.25) -> None:
    """Have ``model.name=tiny`` and ``model.name=interruptible`` name them, in this process."""
    MODELS["tiny"] = partial(Tiny, dropout=dropout)
    MODELS["interruptible"] = Interruptible
