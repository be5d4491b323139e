"""A lazy batch: source images and the parameters of their crops.

The first convolution of a network may consume it without materializing pixels, because a convolution of
enlarged images is a convolution of the source images with other weights (:func:`folded_conv2d`). On the CPU
that takes a quarter of the time of materializing the batch and convolving it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .augment import augment
from .folded_block import folded_conv2d_relu_lrn_max_pool
from .folded_conv import folded_conv2d


@dataclass(frozen=True)
class LazyBatch:
    """Crops of enlarged images, not yet materialized.

    Attributes:
        images: uint8 (N, H, W, 3), the whole data set.
        indices: int64 (B,), the image of each crop.
        offsets: int32 (B, 2), top and left of each crop in the enlarged image.
        flips: bool (B,), which crops are mirrored.
        resize, crop: pixels on each axis, of the enlarged image and of a crop.
        mean, std: three numbers each, one per channel, for pixels in 0..1.
        dtype: of the materialized batch: float32, bfloat16 or float16.
        colors: float32 (B, 3), what is added to every pixel of a crop, in units of pixels in 0..1; None: 0.
        keep_shape: as for :func:`fastalex.kernels.augment`. Only a batch of square images can be convolved.
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
    colors: Tensor | None = None
    keep_shape: bool = False

    @property
    def shape(self) -> torch.Size:
        """The shape of the materialized batch: (B, 3, crop, crop)."""
        return torch.Size((len(self.indices), 3, self.crop, self.crop))

    def chunk(self, chunks: int) -> list[LazyBatch]:
        """Split the batch into lazy batches, as ``Tensor.chunk`` does."""
        names = ["indices", "offsets", "flips", *(["colors"] if self.colors is not None else [])]
        parts = zip(*(getattr(self, name).chunk(chunks) for name in names), strict=True)
        return [replace(self, **dict(zip(names, part, strict=True))) for part in parts]

    def materialize(self, out: Tensor | None = None) -> Tensor:
        """The batch, (B, 3, crop, crop), channels-last; written to `out`, if it is given."""
        return augment(**vars(self), out=out)

    def convolve(self, convolution: nn.Conv2d) -> Tensor:
        """``convolution(self.materialize())`` to rounding, without materializing the batch.

        Args:
            convolution: with a bias; stride and padding are the same on both axes, padding is of zeros and a
                number, and there are no groups and no dilation.

        Raises:
            ValueError: another convolution, or what :func:`fastalex.kernels.folded_conv2d` refuses.
        """
        return folded_conv2d(**self._folded(convolution))

    def convolve_and_pool(
        self, convolution: nn.Conv2d, size: int, alpha: float, beta: float, k: float
    ) -> Tensor:
        """``relu_lrn_max_pool(self.convolve(convolution), ...)``, without storing its argument."""
        numbers: dict[str, Any] = {"size": size, "alpha": alpha, "beta": beta, "k": k}
        return folded_conv2d_relu_lrn_max_pool(**self._folded(convolution), **numbers)

    def _folded(self, convolution: nn.Conv2d) -> dict[str, Any]:
        """The arguments of a folded convolution."""
        if (
            convolution.bias is None
            or len({*convolution.stride}) > 1
            or len({*convolution.padding}) > 1
            or isinstance(convolution.padding, str)
            or convolution.padding_mode != "zeros"
            or convolution.dilation != (1, 1)
            or convolution.groups > 1
        ):
            raise ValueError(
                f"LazyBatch: convolve() does not compute {convolution}; call materialize() first"
            )
        geometry = {name: value for name, value in vars(self).items() if name != "keep_shape"}
        return {
            **geometry,
            "weight": convolution.weight,
            "bias": convolution.bias,
            "stride": convolution.stride[0],
            "padding": convolution.padding[0],
        }
