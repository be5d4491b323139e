"""A four-layer convolutional network for the paper's comparison of ReLU and tanh (Figure 1).

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012. The
paper gives no sizes. These are those of the CIFAR-10 example in cuda-convnet, the paper's own program, with
max pooling everywhere.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fastalex.errors import ConfigError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class FourLayer(nn.Module):
    """Three convolutions, each followed by an activation and pooling, and one fully connected layer.

    Args:
        num_classes: width of the output layer.
        activation: ``"relu"`` or ``"tanh"``.

    Shape:
        input ``(N, 3, H, W)`` with H and W at least 15, meant for 32; output logits ``(N, num_classes)``.

    Raises:
        ConfigError: for another activation.
    """

    # Limits that fastalex.models checks: three 3x3 stride-2 pools reduce 15 pixels to one.
    min_crop = 15
    trains_on_one_image = True

    def __init__(self, num_classes: int = 10, *, activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"model.activation={activation}: choose {' or '.join(ACTIVATIONS)}")
        channels = (3, 32, 32, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [
                nn.Conv2d(before, after, kernel_size=5, padding=2),
                ACTIVATIONS[activation](),
                nn.MaxPool2d(3, stride=2),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3))  # at 32x32 it changes nothing
        self.output = nn.Linear(channels[-1] * 9, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.output(self.features(images).flatten(1))
        return logits
