"""AlexNet as in the paper, on one device, and the variants that it is compared with.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex.errors import ConfigError
from fastalex.kernels import LazyBatch, relu_lrn, relu_lrn_max_pool
from fastalex.models.dropout import Dropout
from fastalex.models.factored_linear import FactoredLinear, Tap
from fastalex.models.pooled_linear import PooledLinear
from fastalex.models.winograd import Conv2d, WinogradConv2d

# Section 3.3 of the paper: n = 5, k = 2, alpha = 1e-4, beta = 0.75. The paper multiplies alpha by the sum of
# the squares, PyTorch by their mean over the window, so PyTorch's alpha is n times the paper's.
LRN_SIZE = 5
LRN_ALPHA = LRN_SIZE * 1e-4
LRN_BETA = 0.75
LRN_K = 2.0


class NormPool(nn.Module):
    """ReLU, normalisation and max pooling, as they follow each of the first two convolutions.

    Args:
        channels: output channels of the convolution.
        norm: ``"lrn"`` after the ReLU, as in the paper; ``"batch"`` before it, as is usual for batch
            normalisation; or ``"none"``.
        overlapping_pool: 3x3 windows with stride 2 if true, 2x2 windows with stride 2 if false.

    Shape:
        input ``(N, channels, H, W)`` and, where :attr:`adds_bias`, the convolution's bias ``(channels,)``;
        output the same as the input with H and W pooled.

    Attributes:
        fused_bias: whether this layer adds the bias of the convolution before it, where one kernel computes
            the layer. On CUDA a convolution adds its bias in a pass over its output, and sums the gradient in
            another. On the CPU both are part of the convolution.
    """

    fused_bias = False

    def __init__(self, channels: int, norm: str, overlapping_pool: bool) -> None:
        super().__init__()
        self.norm = norm
        self.pool_size = 3 if overlapping_pool else 2
        self.batch_norm = nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()

    @property
    def is_fused(self) -> bool:
        """Whether one kernel computes ReLU, normalisation and pooling."""
        return self.norm == "lrn" and self.pool_size == 3

    @property
    def adds_bias(self) -> bool:
        """Whether to give the convolution's bias to this layer."""
        return self.fused_bias and self.is_fused

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.is_fused:
            return relu_lrn_max_pool(x, LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K, bias)
        if self.norm == "lrn":
            x = relu_lrn(x, LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K)
        else:
            x = F.relu(self.batch_norm(x))
        return F.max_pool2d(x, self.pool_size, stride=2)

    def extra_repr(self) -> str:
        return f"norm={self.norm}, pool_size={self.pool_size}"


class AlexNet(nn.Module):
    """AlexNet; with ``groups=2`` its convolutions are connected as on the paper's two GPUs.

    Args:
        num_classes: width of the output layer.
        groups: groups of the second, fourth and fifth convolutions: 1, or the paper's 2.
        norm: ``"lrn"``, ``"batch"`` or ``"none"`` after the first two convolutions.
        overlapping_pool: 3x3 stride-2 max pooling (the paper's) if true, 2x2 stride-2 if false. Both give
            the same sizes at 224x224.
        dropout: probability of dropping each hidden unit of the fully connected layers; 0 <= dropout < 1.
        init: ``"default"`` is PyTorch's; ``"paper"`` is N(0, 0.01) with bias 1 on the second, fourth and
            fifth convolutions and the hidden fully connected layers, and 0 elsewhere (section 5 of the
            paper); ``"he"`` is N(0, 2/fan_in) with zero bias and an output layer of N(0, 0.01).

    Shape:
        input ``(N, 3, H, W)`` with H and W at least 63, meant for 224; output logits ``(N, num_classes)``.
        The input may be a lazy batch: :class:`fastalex.kernels.LazyBatch`. With two taps
        (:mod:`fastalex.models.factored_linear`), one for each hidden layer, the output is the logits and the
        list of those layers' inputs.

    Raises:
        ConfigError: if an option has a value that is not listed above.
    """

    # Limits that fastalex.models checks. Three stride-2 pools follow a stride-4 convolution: a smaller crop
    # leaves the last pool no 3x3 window. Batch normalisation is at the first two convolutions, whose outputs
    # have many pixels.
    min_crop = 63
    trains_on_one_image = True

    def __init__(
        self,
        num_classes: int = 10,
        *,
        groups: int = 1,
        norm: str = "lrn",
        overlapping_pool: bool = True,
        dropout: float = 0.5,
        init: str = "default",
    ) -> None:
        super().__init__()
        if groups not in (1, 2):
            raise ConfigError(f"model.groups={groups}: AlexNet has 1 group, or the paper's 2")
        if norm not in ("lrn", "batch", "none"):
            raise ConfigError(f"model.norm={norm}: choose lrn, batch or none")
        if not 0 <= dropout < 1:
            raise ConfigError(f"model.dropout={dropout}: a probability from 0 up to, but not including, 1")
        if init not in INITIALISERS:
            raise ConfigError(f"model.init={init}: choose {', '.join(INITIALISERS)}")
        self.conv1 = Conv2d(3, 96, kernel_size=11, stride=4, padding=2)
        self.norm_pool1 = NormPool(96, norm, overlapping_pool)
        self.conv2 = WinogradConv2d(96, 256, kernel_size=5, padding=2, groups=groups)
        self.norm_pool2 = NormPool(256, norm, overlapping_pool)
        self.conv3 = WinogradConv2d(256, 384, kernel_size=3, padding=1)
        self.conv4 = WinogradConv2d(384, 384, kernel_size=3, padding=1, groups=groups)
        self.conv5 = WinogradConv2d(384, 256, kernel_size=3, padding=1, groups=groups)
        self.pool5 = nn.MaxPool2d(3 if overlapping_pool else 2, stride=2)
        self.fc6 = PooledLinear(256, 6, 4096)
        self.fc7 = FactoredLinear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout = Dropout(dropout)
        INITIALISERS[init](self)

    @property
    def hidden_layers(self) -> tuple[str, str]:
        """Names of the layers that ``distributed.strategy=hybrid`` shards over the ranks."""
        return "fc6", "fc7"

    @property
    def factored_layers(self) -> tuple[FactoredLinear, FactoredLinear]:
        """The layers that the taps of :meth:`forward` are for."""
        return self.fc6, self.fc7

    @property
    def stride_over_crops(self) -> int:
        """Stride of the first convolution. A network with this attribute accepts lazy batches."""
        return self.conv1.stride[0]

    def _first_block(self, images: Tensor | LazyBatch) -> Tensor:
        if isinstance(images, Tensor):
            return _convolve_and_pool(self.conv1, self.norm_pool1, images)
        if self.norm_pool1.is_fused:
            return images.convolve_and_pool(self.conv1, LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K)
        return self.norm_pool1(images.convolve(self.conv1))

    def forward(
        self, images: Tensor | LazyBatch, taps: Sequence[Tap | None] = ()
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        x = self._first_block(images)
        x = _convolve_and_pool(self.conv2, self.norm_pool2, x)
        x = F.relu(self.conv3(x), inplace=True)
        x = F.relu(self.conv4(x), inplace=True)
        x = F.relu(self.conv5(x), inplace=True)
        x = self.pool5(x)
        inputs = []
        for layer, tap in zip_longest((self.fc6, self.fc7), taps):
            if tap is None:
                x = layer(x)
            else:
                x, seen = layer.tapped(x, tap)
                inputs.append(seen)
            x = self.dropout(F.relu(x))
        logits = self.fc8(x)
        return (logits, inputs) if taps else logits


def _convolve_and_pool(convolution: Conv2d, norm_pool: NormPool, x: Tensor) -> Tensor:
    if norm_pool.adds_bias:
        return norm_pool(convolution(x, add_bias=False), convolution.bias)
    return norm_pool(convolution(x))


def _init_default(model: AlexNet) -> None:
    """Keep PyTorch's initialisation, which each layer's constructor has done."""


def _init_paper(model: AlexNet) -> None:
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
    for name, layer in model.named_children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, 1.0 if name in ones else 0.0)


@torch.no_grad()
def _init_he(model: AlexNet) -> None:
    for layer in model.children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    nn.init.normal_(model.fc8.weight, std=0.01)  # logits start near zero: the first loss is ln(num_classes)


INITIALISERS = {"default": _init_default, "paper": _init_paper, "he": _init_he}
