"""Photographs keep their shape or become a square; one cache of decoded images serves both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from fastalex.config import DataConfig, Fit, LoaderConfig
from fastalex.data import Views, load_splits
from fastalex.data.fit import fitted
from tests.runtimes import loader_on

SIZES = [(60, 90), (90, 61), (20, 20), (33, 32), (7, 300), (1000, 10), (1, 5), (41, 40)]


def noise(size: tuple[int, int]) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("target", [20, 33])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_torchvision_in_float64(size: tuple[int, int], target: int) -> None:
    image = noise(size)
    kept = v2.CenterCrop(target)(v2.Resize(target, antialias=True)(image.double()))
    stretched = v2.Resize((target, target), antialias=True)(image.double())
    for fit, wanted in ((Fit.shorter_side, kept), (Fit.square, stretched)):
        assert (fitted(image, target, fit) - wanted).abs().max() <= 1
        torch.testing.assert_close(fitted(image.double(), target, fit), wanted, rtol=0, atol=1e-9)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("size", [(2, 20_000), (20_000, 2), (400, 20_000)], ids=str)
def test_a_long_thin_image_takes_little_memory(size: tuple[int, int]) -> None:
    """Its longer side resized as a whole, 2 x 20000 pixels would be 2 x 2560000."""
    image = noise(size)
    with Largest() as largest:
        assert fitted(image, 256, Fit.shorter_side).shape == (3, 256, 256)
    assert largest.elements <= max(image.numel(), 3 * 256 * 256)


def test_one_cache_serves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds images as they were decoded, so its key does not depend on what becomes of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for i in range(10):
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    options = {"root": str(tmp_path / "images"), "resize": 24, "crop": 24, "mean": [0.0] * 3}
    for fit in (Fit.square, Fit.shorter_side, Fit.square):
        data = DataConfig("imagefolder", fit=fit, **options)  # type: ignore[arg-type]
        images = load_splits(data, 0, progress=False).test
        loader = loader_on(images, data, LoaderConfig("resident"), views=Views.center, batch_size=len(images))
        ((batch, _),) = loader
        assert images.pixels is not None
        assert images.pixels.shape[1:] == (20, 31, 3)
        planes = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).double()
        if fit is Fit.square:
            wanted = v2.Resize((24, 24), antialias=True)(planes)
        else:
            wanted = v2.CenterCrop(24)(v2.Resize(24, antialias=True)(planes))
        torch.testing.assert_close(batch.double(), wanted / 255, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "cache" / "fastalex").glob("*/index.json"))) == 1
