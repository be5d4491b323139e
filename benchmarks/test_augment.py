"""`augment` against torchvision on the same images, interleaved: images a second, in one run.

    python -m pytest benchmarks/test_augment.py --benchmark-enable

Before every timed round of `augment` its rivals take a turn, so that all of them see the same machine. Their
medians, and how many times faster `augment` is, are in each benchmark's extra_info. Memory that is freed
stays with the process, as in a training run (`fastalex.runtime.keep_pages`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastalex.config import DataConfig, LoaderConfig
from fastalex.data import ImageSet, Views, build_loader
from fastalex.kernels import augment, ten_crop
from fastalex.runtime import keep_pages

DATA = DataConfig(name="synthetic", resize=256, crop=224)
OPTIONS: dict[str, Any] = {
    "resize": DATA.resize,
    "crop": DATA.crop,
    "mean": DATA.mean,
    "std": DATA.std,
    "dtype": torch.bfloat16,
}
ROUNDS = 11


def plan(images: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(DATA.resize - DATA.crop + 1, (batch, 2), generator=generator, dtype=torch.int32)
    flips = torch.randint(2, (batch,), generator=generator).bool()
    return torch.randint(images, (batch,), generator=generator), offsets, flips


def pixels(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def finish(crops: Tensor) -> Tensor:
    values = F.normalize(F.to_dtype(crops, torch.float32, scale=True), DATA.mean, DATA.std, inplace=True)
    return values.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def with_torchvision(images: Tensor, indices: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """The whole batch resized at once, in the layout and the type that torchvision is fastest in."""
    resized = F.resize(images[indices].permute(0, 3, 1, 2), [DATA.resize] * 2)
    crops = []
    for image, (top, left), flip in zip(resized, offsets.tolist(), flips.tolist(), strict=True):
        crop = F.crop(image, top, left, DATA.crop, DATA.crop)
        crops.append(F.horizontal_flip(crop) if flip else crop)
    return finish(torch.stack(crops))


def ten_crop_with_torchvision(images: Tensor) -> Tensor:
    resized = F.resize(images.permute(0, 3, 1, 2), [DATA.resize] * 2)
    return finish(torch.stack(F.ten_crop(resized, [DATA.crop] * 2), dim=1).flatten(0, 1))


def compare(
    benchmark: Any,
    ours: Callable[[], object],
    count: int,
    rivals: dict[str, tuple[Callable[[], object], int]],
) -> None:
    """Times `ours`, which makes `count` images, and each rival, with the number it makes, by turns."""
    keep_pages()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def others() -> None:
        for name, (rival, made) in rivals.items():
            start = time.perf_counter()
            rival()
            seconds[name].append((time.perf_counter() - start) / made)

    ours()
    others()
    benchmark.pedantic(ours, setup=others, rounds=ROUNDS)
    if benchmark.stats is None:  # --benchmark-disable: the code ran once, and that is all
        return
    own = benchmark.stats.stats.median / count
    benchmark.extra_info["images/s"] = round(1 / own)
    for name, times in seconds.items():
        benchmark.extra_info[f"{name}, images/s"] = round(1 / median(times[2:]))
        benchmark.extra_info[f"times {name}"] = round(median(times[2:]) / own, 1)


def dataloader_epoch(images: Tensor, workers: int) -> Callable[[], object]:
    """An epoch of the torchvision loader, from idle workers to idle workers."""
    split = ImageSet(np.zeros(len(images), np.int64), pixels=images.numpy())
    config = LoaderConfig(name="torchvision", workers=workers)
    loader = build_loader(split, DATA, config, views=Views.random, batch_size=128, dtype=torch.bfloat16)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


@pytest.mark.benchmark(group="augment")
def test_enlarging_small_images(benchmark: Any) -> None:
    """128 crops of 224 from 32-pixel images resized to 256: a training batch of CIFAR-10."""
    images = pixels(512, 32, 32)
    indices, offsets, flips = plan(len(images), 128)
    compare(
        benchmark,
        lambda: augment(images, offsets, flips, indices=indices, **OPTIONS),
        128,
        {
            "torchvision, batched": (lambda: with_torchvision(images, indices, offsets, flips), 128),
            "torchvision, DataLoader": (dataloader_epoch(images, workers=2), len(images)),
        },
    )


@pytest.mark.benchmark(group="augment")
def test_shrinking_photographs(benchmark: Any) -> None:
    """32 crops of 224 from decoded 500x375 photographs."""
    images = pixels(32, 375, 500)
    indices, offsets, flips = plan(len(images), 32)
    compare(
        benchmark,
        lambda: augment(images, offsets, flips, indices=indices, **OPTIONS),
        32,
        {"torchvision, batched": (lambda: with_torchvision(images, indices, offsets, flips), 32)},
    )


@pytest.mark.benchmark(group="augment")
def test_ten_crop(benchmark: Any) -> None:
    """Ten views each of 16 images of 32 pixels."""
    images = pixels(16, 32, 32)
    compare(
        benchmark,
        lambda: ten_crop(images, **OPTIONS),
        16,
        {"torchvision, batched": (lambda: ten_crop_with_torchvision(images), 16)},
    )


@pytest.mark.benchmark(group="augment")
def test_resident_epoch(benchmark: Any) -> None:
    """A whole epoch of 16 batches: order, offsets, flips, labels and all."""
    images = pixels(2048, 32, 32)
    split = ImageSet(np.zeros(len(images), np.int64), pixels=images.numpy())
    loader = build_loader(
        split, DATA, LoaderConfig(name="resident"), views=Views.random, batch_size=128, dtype=torch.bfloat16
    )

    def epoch() -> None:
        for _ in loader:
            pass

    compare(benchmark, epoch, len(images), {})
