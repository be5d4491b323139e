"""Properties of the resident loader alone; those of all loaders are in test_agreement.py."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastalex.config import DataConfig, Flip, LoaderConfig
from fastalex.data import DataSplits, ImageSet, Views, resolve_loader
from fastalex.data.resident import ResidentLoader
from fastalex.errors import DataError
from fastalex.kernels import augment_reference
from tests.runtimes import loader_on

GPU = torch.device("cuda", 0)


def images(count: int = 20) -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(np.arange(count) % 7, pixels=rng.integers(0, 256, (count, 8, 10, 3), dtype=np.uint8))


def build(split: ImageSet, views: Views = Views.random, **options: Any) -> ResidentLoader:
    data = DataConfig(name="test", resize=20, crop=16, flip=options.pop("flip", Flip.random))
    settings = {"batch_size": 6, **options}
    loader = loader_on(split, data, LoaderConfig(name="resident"), views=views, **settings)
    assert isinstance(loader, ResidentLoader)
    return loader


@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("flip", list(Flip), ids=lambda flip: flip.value)
def test_yields_the_reference_result_for_the_plan(views: Views, flip: Flip) -> None:
    split = images()
    loader = build(split, views, flip=flip, seed=3)
    plan = loader.plan()
    assert split.pixels is not None
    pixels = torch.from_numpy(split.pixels)
    corners = torch.tensor([[0, 0], [0, 4], [4, 0], [4, 4], [2, 2]], dtype=torch.int32)
    for number, (batch, labels) in enumerate(loader):
        rows = plan.batch(number, 6)
        offsets, flips = rows.offsets, rows.flips
        if views is Views.ten_crop:
            mirrored = corners * torch.tensor([1, -1], dtype=torch.int32) + torch.tensor([0, 4])
            offsets = corners if flip is Flip.none else torch.cat([corners, mirrored.int()])
            flips = torch.arange(len(offsets)) >= 5
        options = None, loader.num_views, 20, False, 16, loader.data.mean, loader.data.std, torch.float32
        expected = augment_reference.augment(pixels, rows.indices, offsets, flips, *options)
        torch.testing.assert_close(batch, expected, rtol=0, atol=1e-6)
        assert torch.equal(labels, torch.from_numpy(split.labels)[rows.indices])
    assert number + 1 == len(loader)


def test_does_not_copy_the_pixels_on_the_cpu() -> None:
    split = images()
    assert split.pixels is not None
    loader = build(split)
    before = next(iter(loader))[0].clone()
    split.pixels[:] = 0
    after = next(iter(loader))[0]
    assert not torch.equal(before, after)
    assert after[0, 0].unique().numel() == 1


def test_accepts_pixels_mapped_read_only(tmp_path: Path) -> None:
    split = images()
    assert split.pixels is not None
    np.save(tmp_path / "pixels.npy", split.pixels)
    mapped = ImageSet(split.labels, pixels=np.load(tmp_path / "pixels.npy", mmap_mode="r"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(build(mapped))
    for (batch, labels), (expected, expected_labels) in zip(found, build(split), strict=True):
        assert torch.equal(batch, expected)
        assert torch.equal(labels, expected_labels)


def test_loaders_over_one_split_share_its_pixels_and_the_last_frees_them() -> None:
    split = images()
    train, test = build(split), build(split, Views.ten_crop)
    other = build(images())
    assert train._pixels is test._pixels
    assert other._pixels is not train._pixels
    pixels = weakref.ref(train._pixels)
    del train
    gc.collect()
    assert pixels() is not None
    del test
    gc.collect()
    assert pixels() is None


def test_files_of_different_sizes_are_refused(tmp_path: Path) -> None:
    files = ImageSet(np.zeros(2, np.int64), paths=(tmp_path / "a.jpg", tmp_path / "b.jpg"))
    with pytest.raises(DataError, match=r"loader.name=resident .* use loader=torchvision or loader=dali"):
        build(files, Views.center)


def splits(train: ImageSet, validation: ImageSet, test: ImageSet) -> DataSplits:
    return DataSplits(train, validation, test, classes=tuple("abcdefg"))


def test_auto_is_resident_if_all_splits_fit_together(tmp_path: Path) -> None:
    """Each split alone fits; with one byte less than all of them take, the data set does not."""
    parts = images(20), images(8), images(5)
    size = 33 * 8 * 10 * 3

    def chosen(data: DataSplits, room: int | None) -> str:
        return resolve_loader(LoaderConfig(name="auto"), data, room).name

    for room, expected in ((size, "resident"), (size - 1, "torchvision"), (-1, "torchvision")):
        assert chosen(splits(*parts), room) == expected
    assert chosen(splits(*parts), None) == "resident"  # a CPU's memory holds them already
    files = ImageSet(np.zeros(1, np.int64), paths=(tmp_path / "a.jpg",))
    for room in (None, 2 * size):
        assert chosen(splits(*parts[:2], files), room) == "torchvision"


def test_images_shared_by_splits_count_once() -> None:
    test = images(8)
    auto = LoaderConfig(name="auto")
    assert resolve_loader(auto, splits(images(20), test, test), 28 * 240).name == "resident"
    assert resolve_loader(auto, splits(images(20), test, images(8)), 28 * 240).name == "torchvision"


@pytest.mark.gpu
def test_gives_the_same_pixels_on_a_gpu() -> None:
    for views in (Views.center, Views.ten_crop):
        on_gpu, on_cpu = build(images(), views, device=GPU), build(images(), views)
        for (found, labels), (expected, expected_labels) in zip(on_gpu, on_cpu, strict=True):
            assert found.device == GPU
            assert torch.equal(labels.cpu(), expected_labels)
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
