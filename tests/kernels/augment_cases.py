"""Arguments of `augment`, and its expected results in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import center_crop
from torchvision.transforms.v2.functional import resize as resize_image

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = [0.485, 0.456, 0.406], [0.9, 1.0, 0.25]
TORCH_ERROR = 2e-5  # of a resize in fp32, divided by the smallest STD: 0.001 grey levels
# height, width, resize, crop: enlarging, shrinking, both at once, neither; odd sizes, one pixel, rows that
# are not a whole number of vectors.
SHAPES = [
    (32, 32, 256, 224),
    (32, 32, 64, 56),
    (8, 8, 8, 8),
    (20, 37, 40, 29),
    (1, 1, 7, 5),
    (1, 6, 7, 7),
    (9, 3, 3, 1),
    (37, 50, 25, 22),
    (8, 30, 16, 13),
    (200, 3, 8, 5),
]

# Of images that keep their shape, height, width, resize and crop: enlarged and shrunk, high and wide; a side
# that is rounded down, halves of a pixel at the square's place, one that is long and thin.
SHAPES_KEPT = [
    (9, 16, 32, 27),
    (17, 8, 24, 24),
    (40, 61, 23, 20),
    (50, 37, 20, 13),
    (8, 8, 16, 12),
    (2, 300, 16, 9),
]


def sample(height: int, width: int, resize: int, crop: int, count: int = 5) -> dict[str, Any]:
    """Arguments of `augment`: seven images, and crops that include both corners, both flips and colours."""
    generator = torch.Generator().manual_seed(height * 1000 + resize)
    limit = resize - crop
    offsets = torch.randint(limit + 1, (count, 2), generator=generator, dtype=torch.int32)
    offsets[:1], offsets[1:2] = 0, limit
    return {
        "images": torch.randint(256, (7, height, width, 3), generator=generator, dtype=torch.uint8),
        "offsets": offsets,
        "flips": torch.arange(count) % 2 == 1,
        "colors": torch.randn(count, 3, generator=generator) / 8,
        "indices": torch.randint(7, (count,), generator=generator),
        "resize": resize,
        "crop": crop,
        "mean": MEAN,
        "std": STD,
    }


def in_float64(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    indices: Tensor,
    resize: int,
    crop: int,
    mean: list[float],
    std: list[float],
    colors: Tensor | None = None,
    keep_shape: bool = False,
) -> Tensor:
    """The expected result of `augment`."""
    planes = images.permute(0, 3, 1, 2).double()
    if keep_shape:
        resized = center_crop(resize_image(planes, [resize], antialias=True), [resize, resize])
    else:
        resized = interpolate(planes, (resize, resize), mode="bilinear", antialias=True)
    shift, scale = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    crops = []
    for i, (index, (top, left)) in enumerate(zip(indices.tolist(), offsets.tolist(), strict=True)):
        pixels = resized[index, :, top : top + crop, left : left + crop] / 255
        if colors is not None:
            pixels = pixels + colors[i].double()[:, None, None]
        crops.append(((pixels.flip(-1) if flips[i] else pixels) - shift) / scale)
    return torch.stack(crops)
