"""`augment` against torchvision and DALI on the same images, interleaved in one run.

    python -m pytest benchmarks/test_augment.py --benchmark-enable -s

The implementations take turns, so that all of them see the same machine. Freed memory stays with the process,
as in a training run (`fastalex.runtime.keep_pages`). On a GPU the images are in its memory; the time of a
batch is that of its kernels, of torchvision's too, without Python's time to launch them
(`benchmarks.hardware.seconds_of`), and the time of an epoch is wall time. A complete run writes
`benchmarks/results/augment_KIND.csv` (`hardware.py`): ms per batch, images/s, and how many times faster than
each rival `augment` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from benchmarks.hardware import DEVICE, KIND, seconds, seconds_of
from benchmarks.report import RESULTS, Measurement, write_csv
from benchmarks.turns import seconds_by_turns
from fastalex.config import DataConfig, LoaderConfig, Precision, RuntimeConfig
from fastalex.data import ImageSet, Views, build_loader
from fastalex.kernels import augment, ten_crop
from fastalex.runtime import choose_runtime, keep_pages

DATA = DataConfig(name="synthetic", resize=256, crop=224)
OPTIONS: dict[str, Any] = {
    "resize": DATA.resize,
    "crop": DATA.crop,
    "mean": DATA.mean,
    "std": DATA.std,
    "dtype": torch.bfloat16,
}
ROUNDS = 15
CASES = 4


class TimedCall(NamedTuple):
    """A call, the number of images that it makes, and the function that times it."""

    call: Callable[[], object]
    images: int
    time: Callable[[Callable[[], object]], float] = lambda call: seconds_of(call)[0]


@pytest.fixture(scope="module")
def measurements() -> Iterator[list[Measurement]]:
    """Collects the measurements of all cases; writes them only if all have run."""
    keep_pages()
    collected: list[Measurement] = []
    yield collected
    for m in collected:
        print(f"\n{m['case']}: {m['implementation']}, {m['images_per_s']:,.0f} images/s", end="")
    if len({m["case"] for m in collected}) == CASES:
        write_csv(collected, RESULTS / f"augment_{KIND}.csv", DEVICE, unit="ms")


def plan(images: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(DATA.resize - DATA.crop + 1, (batch, 2), generator=generator, dtype=torch.int32)
    flips = torch.randint(2, (batch,), generator=generator).bool()
    return torch.randint(images, (batch,), generator=generator), offsets, flips


def pixels(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


@cache  # created in every batch they would be copied from the host to a GPU each time
def mean_and_std() -> list[Tensor]:
    return [torch.tensor(value, device=DEVICE) for value in (DATA.mean, DATA.std)]


def finish(crops: Tensor) -> Tensor:
    values = F.normalize(F.to_dtype(crops, torch.float32, scale=True), *mean_and_std(), inplace=True)
    return values.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def with_torchvision(
    images: Tensor, indices: Tensor, offsets: list[tuple[int, int]], flips: list[bool]
) -> Tensor:
    """Resize the whole batch at once, in the layout and the dtype in which torchvision is fastest."""
    resized = F.resize(images[indices].permute(0, 3, 1, 2), [DATA.resize] * 2)
    crops = []
    for image, (top, left), flip in zip(resized, offsets, flips, strict=True):
        crop = F.crop(image, top, left, DATA.crop, DATA.crop)
        crops.append(F.horizontal_flip(crop) if flip else crop)
    return finish(torch.stack(crops))


def ten_crop_with_torchvision(images: Tensor) -> Tensor:
    resized = F.resize(images.permute(0, 3, 1, 2), [DATA.resize] * 2)
    return finish(torch.stack(F.ten_crop(resized, [DATA.crop] * 2), dim=1).flatten(0, 1))


def compare(
    measurements: list[Measurement],
    benchmark: Any,
    case: str,
    ours: TimedCall,
    rivals: dict[str, TimedCall],
) -> None:
    """Time `ours` and each rival by turns."""
    calls = {**rivals, "fastalex": ours}
    turns = {name: partial(turn, case, timed) for name, timed in calls.items()}
    seconds = seconds_by_turns(benchmark, turns, ROUNDS)
    own = median(seconds[case, "fastalex"]) / ours.images
    found = []
    for name, timed in calls.items():
        spent = median(seconds[case, name])
        found.append(
            Measurement.of_times(
                {"case": case, "implementation": name, "images": timed.images},
                seconds[case, name],
                images_per_s=timed.images / spent,
                augment_is_times_faster=spent / timed.images / own,
            )
        )
    measurements += found
    benchmark.extra_info["images/s"] = {m["implementation"]: m["images_per_s"] for m in found}


def turn(case: str, timed: TimedCall) -> dict[str, float]:
    return {case: timed.time(timed.call)}


def batch(images: Tensor, count: int) -> tuple[TimedCall, TimedCall]:
    """`augment` and torchvision on `count` crops of the images, which are on the device."""
    indices, offsets, flips = plan(len(images), count)
    images, indices = images.to(DEVICE), indices.to(DEVICE)
    ours = partial(augment, images, offsets.to(DEVICE), flips.to(DEVICE), indices=indices, **OPTIONS)
    theirs = partial(with_torchvision, images, indices, offsets.tolist(), flips.tolist())
    return TimedCall(ours, count), TimedCall(theirs, count)


def epoch(name: str, images: Tensor) -> TimedCall:
    """An epoch of one of the loaders with one worker per core, from idle workers to idle workers."""
    split = ImageSet(np.zeros(len(images), np.int64), pixels=images.numpy())
    config = LoaderConfig(name=name, workers=torch.get_num_threads())
    loader = build_loader(
        split,
        DATA,
        config,
        views=Views.random,
        batch_size=128,
        runtime=choose_runtime(RuntimeConfig(device=DEVICE, precision=Precision.bf16)),
    )

    def run() -> None:
        for _ in loader:
            pass

    return TimedCall(run, len(images), seconds)


@pytest.mark.benchmark(group="augment")
@pytest.mark.usefixtures("enabled")
def test_enlarging_small_images(measurements: list[Measurement], benchmark: Any) -> None:
    """128 crops of 224 from 32-pixel images resized to 256: a training batch of CIFAR-10."""
    images = pixels(512, 32, 32)
    ours, torchvision = batch(images, 128)
    rivals = {"torchvision, batched": torchvision, "torchvision, DataLoader": epoch("torchvision", images)}
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        rivals[f"DALI, {DEVICE.upper()} pipeline"] = epoch("dali", images)
    compare(measurements, benchmark, "32 x 32 to 256, crop 224", ours, rivals)


@pytest.mark.benchmark(group="augment")
@pytest.mark.usefixtures("enabled")
def test_shrinking_photographs(measurements: list[Measurement], benchmark: Any) -> None:
    """32 crops of 224 from decoded 500x375 photographs."""
    ours, torchvision = batch(pixels(32, 375, 500), 32)
    compare(
        measurements, benchmark, "500 x 375 to 256, crop 224", ours, {"torchvision, batched": torchvision}
    )


@pytest.mark.benchmark(group="augment")
@pytest.mark.usefixtures("enabled")
def test_ten_crop(measurements: list[Measurement], benchmark: Any) -> None:
    """Ten views each of 16 images of 32 pixels."""
    images = pixels(16, 32, 32).to(DEVICE)
    compare(
        measurements,
        benchmark,
        "ten-crop, 32 x 32 to 256, crop 224",
        TimedCall(lambda: ten_crop(images, **OPTIONS), len(images)),
        {"torchvision, batched": TimedCall(lambda: ten_crop_with_torchvision(images), len(images))},
    )


@pytest.mark.benchmark(group="augment")
@pytest.mark.usefixtures("enabled")
def test_resident_epoch(measurements: list[Measurement], benchmark: Any) -> None:
    """A whole epoch of 16 batches, with order, offsets, flips and labels."""
    ours = epoch("resident", pixels(2048, 32, 32))
    compare(measurements, benchmark, "resident epoch, 32 x 32 to 256, crop 224", ours, {})
