"""AlexNet in plain PyTorch, without fastalex's kernels: what is exported.

:func:`fastalex.models.plain.definition` copies the source of the class and the function to a file that needs
nothing but torch. They have the weights' names of :class:`fastalex.models.alexnet.AlexNet`, and their outputs
are compared with its own at each export.
"""

from collections import OrderedDict

from torch import Tensor, nn


def norm_pool(channels: int, norm: str, pool: int) -> nn.Sequential:
    """ReLU, normalisation (norm is lrn, batch or none) and max pooling."""
    layers: dict[str, nn.Module] = {"relu": nn.ReLU()}
    if norm == "batch":
        layers = {"batch_norm": nn.BatchNorm2d(channels), "relu": nn.ReLU()}
    elif norm == "lrn":  # the paper's alpha of 1e-4; PyTorch and ONNX divide alpha by the size
        layers["lrn"] = nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0)
    return nn.Sequential(OrderedDict(**layers, pool=nn.MaxPool2d(pool, stride=2)))


class AlexNet(nn.Module):
    """AlexNet: images, float32 (N, 3, H, W), to logits, (N, num_classes)."""

    def __init__(self, num_classes: int, groups: int, norm: str, pool: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, kernel_size=11, stride=4, padding=2)
        self.norm_pool1 = norm_pool(96, norm, pool)
        self.conv2 = nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=groups)
        self.norm_pool2 = norm_pool(256, norm, pool)
        self.conv3 = nn.Conv2d(256, 384, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=groups)
        self.conv5 = nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=groups)
        self.pool5 = nn.MaxPool2d(pool, stride=2)
        self.average = nn.AdaptiveAvgPool2d(6)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm_pool1(self.conv1(images))
        x = self.norm_pool2(self.conv2(x))
        x = self.relu(self.conv3(x))
        x = self.relu(self.conv4(x))
        x = self.pool5(self.relu(self.conv5(x)))
        x = self.average(x).flatten(1)
        x = self.dropout(self.relu(self.fc6(x)))
        x = self.dropout(self.relu(self.fc7(x)))
        return self.fc8(x)
