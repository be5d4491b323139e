"""`augment` against torchvision and DALI on the same images, interleaved: images a second, in one run.

    python -m pytest benchmarks/test_augment.py --benchmark-enable -s

Before every timed round of `augment` its rivals take a turn, so that all of them see the same machine. Memory
that is freed stays with the process, as in a training run (`fastalex.runtime.keep_pages`). On a GPU the
images lie there; the time of a batch is that of its kernels, of torchvision's too, however long Python takes
to launch them (`benchmarks.hardware.seconds_of`), and that of an epoch is the clock's. A whole run writes
`benchmarks/results/augment_cpu.csv`, `augment_cpu_fp32.csv` on a CPU without bf16, or `augment_cuda.csv`:
milliseconds a batch, images a second, and how many times faster than each rival `augment` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from benchmarks.hardware import DEVICE, KIND, seconds, seconds_of
from benchmarks.report import RESULTS, percentiles, write_csv
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


@dataclass(frozen=True)
class Row:
    """One implementation's time for `images` images."""

    case: str
    implementation: str
    images: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    images_per_s: float
    augment_is_times_faster: float


class Contender(NamedTuple):
    """An implementation, the number of images it makes in a call, and how such a call is timed."""

    call: Callable[[], object]
    images: int
    time: Callable[[Callable[[], object]], float] = lambda call: seconds_of(call)[0]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Any]]:
    """The rows of all cases; written when all have run, so that a part does not replace the whole."""
    keep_pages()
    collected: list[Any] = []
    yield collected
    for row in collected:
        print(f"\n{row.case}: {row.implementation}, {row.images_per_s:,.0f} images/s", end="")
    if len({row.case for row in collected}) == CASES:
        write_csv(collected, RESULTS / f"augment_{KIND}.csv", DEVICE)


def plan(images: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(DATA.resize - DATA.crop + 1, (batch, 2), generator=generator, dtype=torch.int32)
    flips = torch.randint(2, (batch,), generator=generator).bool()
    return torch.randint(images, (batch,), generator=generator), offsets, flips


def pixels(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


@cache  # on a GPU, making them would be a copy from the host in every batch
def mean_and_std() -> list[Tensor]:
    return [torch.tensor(value, device=DEVICE) for value in (DATA.mean, DATA.std)]


def finish(crops: Tensor) -> Tensor:
    values = F.normalize(F.to_dtype(crops, torch.float32, scale=True), *mean_and_std(), inplace=True)
    return values.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def with_torchvision(
    images: Tensor, indices: Tensor, offsets: list[tuple[int, int]], flips: list[bool]
) -> Tensor:
    """The whole batch resized at once, in the layout and the type that torchvision is fastest in."""
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
    rows: list[Any], benchmark: Any, case: str, ours: Contender, rivals: dict[str, Contender]
) -> None:
    """Times `ours` and each rival by turns."""
    if benchmark.disabled:
        pytest.skip("a measurement, not a test: needs --benchmark-enable")
    contenders = {**rivals, "fastalex": ours}
    spent: dict[str, list[float]] = {name: [] for name in contenders}

    def measure(name: str) -> None:
        spent[name].append(contenders[name].time(contenders[name].call))

    def others() -> None:
        for name in rivals:
            measure(name)

    benchmark.pedantic(measure, args=("fastalex",), setup=others, rounds=ROUNDS, warmup_rounds=1)
    own = percentiles(spent["fastalex"][1:])[0] / ours.images  # the first round compiles, or starts processes
    for name, (_, made, _) in contenders.items():
        median, low, high = percentiles(spent[name][1:])
        times = len(spent[name]) - 1
        rows.append(Row(case, name, made, median, low, high, times, made / median * 1e3, median / made / own))
    benchmark.extra_info["images/s"] = {
        row.implementation: row.images_per_s for row in rows if row.case == case
    }


def batch(images: Tensor, count: int) -> tuple[Contender, Contender]:
    """`augment` and torchvision on as many crops of the images, which lie on the device."""
    indices, offsets, flips = plan(len(images), count)
    images, indices = images.to(DEVICE), indices.to(DEVICE)
    ours = partial(augment, images, offsets.to(DEVICE), flips.to(DEVICE), indices=indices, **OPTIONS)
    theirs = partial(with_torchvision, images, indices, offsets.tolist(), flips.tolist())
    return Contender(ours, count), Contender(theirs, count)


def epoch(name: str, images: Tensor) -> Contender:
    """An epoch of one of the loaders, from idle workers, one a core, to idle workers."""
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

    return Contender(run, len(images), seconds)


@pytest.mark.benchmark(group="augment")
def test_enlarging_small_images(rows: list[Any], benchmark: Any) -> None:
    """128 crops of 224 from 32-pixel images resized to 256: a training batch of CIFAR-10."""
    images = pixels(512, 32, 32)
    ours, torchvision = batch(images, 128)
    rivals = {"torchvision, batched": torchvision, "torchvision, DataLoader": epoch("torchvision", images)}
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        rivals[f"DALI, {DEVICE.upper()} pipeline"] = epoch("dali", images)
    compare(rows, benchmark, "32 x 32 to 256, crop 224", ours, rivals)


@pytest.mark.benchmark(group="augment")
def test_shrinking_photographs(rows: list[Any], benchmark: Any) -> None:
    """32 crops of 224 from decoded 500x375 photographs."""
    ours, torchvision = batch(pixels(32, 375, 500), 32)
    compare(rows, benchmark, "500 x 375 to 256, crop 224", ours, {"torchvision, batched": torchvision})


@pytest.mark.benchmark(group="augment")
def test_ten_crop(rows: list[Any], benchmark: Any) -> None:
    """Ten views each of 16 images of 32 pixels."""
    images = pixels(16, 32, 32).to(DEVICE)
    compare(
        rows,
        benchmark,
        "ten-crop, 32 x 32 to 256, crop 224",
        Contender(lambda: ten_crop(images, **OPTIONS), len(images)),
        {"torchvision, batched": Contender(lambda: ten_crop_with_torchvision(images), len(images))},
    )


@pytest.mark.benchmark(group="augment")
def test_resident_epoch(rows: list[Any], benchmark: Any) -> None:
    """A whole epoch of 16 batches: order, offsets, flips, labels and all."""
    ours = epoch("resident", pixels(2048, 32, 32))
    compare(rows, benchmark, "resident epoch, 32 x 32 to 256, crop 224", ours, {})
