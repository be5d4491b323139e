"""A batch that has not been made: the images, and where each is to be cut.

A convolution of enlarged images is one of the images themselves with other weights (`folded_conv2d`). On the
CPU that takes a quarter of the time of making the batch and convolving it, so there the resident loader hands
the network such a batch, and the network's first convolution does with it what it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastalex.config import DataConfig, LoaderConfig
from fastalex.kernels import augment, folded_conv2d, folded_conv2d_relu_lrn_max_pool

if TYPE_CHECKING:
    from fastalex.data import ImageSet


def pays(
    network: nn.Module, images: ImageSet, data: DataConfig, loader: LoaderConfig, device: torch.device
) -> bool:
    """Whether a network is better handed its batches unmade.

    Its first convolution must be able to take them, from the resident loader, on the CPU; and each image must
    be enlarged by a whole multiple of the convolution's stride, or a crop has too many kinds of outputs.
    """
    stride = getattr(network, "stride_over_crops", None)
    if stride is None or images.pixels is None or device.type != "cpu":
        return False
    whole = all(data.resize % (side * stride) == 0 for side in images.pixels.shape[1:3])
    return loader.fold and loader.name == "resident" and whole


@dataclass(frozen=True)
class Crops:
    """Crops of enlarged images.

    Attributes:
        images: uint8 (N, H, W, 3), all of them.
        indices: int64 (B,), which image each crop is of.
        offsets: int32 (B, 2), its top and left in the enlarged image.
        flips: bool (B,), whether it is mirrored.
        resize, crop, mean, std, dtype: as for :func:`fastalex.kernels.augment`.
    """

    images: Tensor
    indices: Tensor
    offsets: Tensor
    flips: Tensor
    resize: int
    crop: int
    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the batch, were it made: (B, 3, crop, crop)."""
        return torch.Size((len(self.indices), 3, self.crop, self.crop))

    def chunk(self, chunks: int) -> list[Crops]:
        """Divide the batch, as ``Tensor.chunk`` does."""
        parts = zip(*(x.chunk(chunks) for x in (self.indices, self.offsets, self.flips)), strict=True)
        return [replace(self, indices=i, offsets=o, flips=f) for i, o, f in parts]

    def make(self) -> Tensor:
        """The batch, (B, 3, crop, crop), channels-last."""
        return augment(**vars(self))

    def convolve(self, convolution: nn.Conv2d) -> Tensor:
        """What the convolution makes of the batch, to rounding, without making it."""
        return folded_conv2d(**self._folded(convolution))

    def convolve_and_pool(
        self, convolution: nn.Conv2d, size: int, alpha: float, beta: float, k: float
    ) -> Tensor:
        """``relu_lrn_max_pool`` of what the convolution makes of the batch, without making that either."""
        numbers = {"size": size, "alpha": alpha, "beta": beta, "k": k}
        return folded_conv2d_relu_lrn_max_pool(**self._folded(convolution), **numbers)

    def _folded(self, convolution: nn.Conv2d) -> dict[str, Any]:
        """The arguments of a folded convolution."""
        return {
            **vars(self),
            "weight": convolution.weight,
            "bias": convolution.bias,
            "stride": convolution.stride[0],
            "padding": convolution.padding[0],
        }
