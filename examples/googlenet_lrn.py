"""The kernels in another network: GoogLeNet's stem and two of its inception blocks, with one line changed.

python examples/googlenet_lrn.py [STEPS]

The network is plain PyTorch; `replace_lrn` puts fastalex's kernel in the place of each layer
`nn.LocalResponseNorm`.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex.kernels import replace_lrn


class Inception(nn.Module):
    """Branches of 1x1, 3x3 and 5x5 convolutions and of pooling, side by side in the channels."""

    def __init__(self, channels: int, ones: int, threes: int, fives: int, pooled: int) -> None:
        super().__init__()
        self.ones = nn.Conv2d(channels, ones, 1)
        self.threes = nn.Sequential(
            nn.Conv2d(channels, threes // 2, 1), nn.ReLU(), nn.Conv2d(threes // 2, threes, 3, padding=1)
        )
        self.fives = nn.Sequential(
            nn.Conv2d(channels, fives // 2, 1), nn.ReLU(), nn.Conv2d(fives // 2, fives, 5, padding=2)
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        branches = self.ones(x), self.threes(x), self.fives(x), self.pooled(x)
        return F.relu(torch.cat(branches, dim=1))


class GoogLeNet(nn.Sequential):
    """Images (N, 3, H, W) to logits (N, classes); the layers of Szegedy et al., 2014, up to inception 3b."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 7, stride=2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            nn.Conv2d(64, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 192, 3, padding=1),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Inception(192, ones=64, threes=128, fives=32, pooled=32),
            Inception(256, ones=128, threes=192, fives=96, pooled=64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(480, classes),
        )


def generated_images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return noise of two classes that differ in brightness, (count, 3, size, size), and the labels."""
    labels = torch.arange(count) % 2
    return torch.randn(count, 3, size, size) + labels[:, None, None, None], labels


def differences(network: nn.Module, other: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Compare two networks of the same weights.

    Returns:
        The norm of the difference of the logits, and that of the gradients of all weights, each as a share of
        the other network's norm.
    """
    logits, gradients = zip(*(_evaluated(each, images, labels) for each in (network, other)), strict=True)
    shares = [(a.double() - b.double()).norm() / b.double().norm() for a, b in (logits, gradients)]
    return shares[0].item(), shares[1].item()


def _evaluated(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    parameters = list(network.parameters())
    logits = network(images.to(parameters[0].dtype))
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
    return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def train(network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Train on one batch and return the loss of each step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int) -> None:
    torch.manual_seed(0)
    plain = GoogLeNet(classes=2)
    network = copy.deepcopy(plain)
    print(f"{replace_lrn(network)} layers replaced")
    network = network.to(memory_format=torch.channels_last)  # the layout that the kernel works in
    images, labels = generated_images(16, 64)
    images = images.to(memory_format=torch.channels_last)
    forward, backward = differences(network, plain, images, labels)
    print(f"difference to PyTorch's layer: {forward:.1e} of the logits, {backward:.1e} of the gradients")
    for step, loss in enumerate(train(network, images, labels, steps), 1):
        print(f"step {step}: loss {loss:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
