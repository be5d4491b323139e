"""The torchvision loader agrees with torchvision's own transforms, and its workers end and fail cleanly."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fastalex.config import DataConfig, Flip, LoaderConfig
from fastalex.data import ImageSet, Loader, Views
from fastalex.data.sampling import training_plan
from fastalex.errors import DataError, ShortageError
from tests.runtimes import loader_on

MEAN, STD = [0.4, 0.5, 0.6], [1.0, 0.5, 0.25]


def noise(count: int, size: int = 12) -> ImageSet:
    """Images of noise; each image's label is its index."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size + 1, 3), dtype=np.uint8)
    return ImageSet(np.arange(count), pixels=pixels)


def build(images: ImageSet, views: Views = Views.random, *, workers: int = 0, **options: object) -> Loader:
    data = {key: options.pop(key) for key in ("resize", "crop", "flip") if key in options}
    config = DataConfig(name="test", **{"resize": 20, "crop": 16, "mean": MEAN, "std": STD, **data})  # type: ignore[arg-type]
    settings = {"batch_size": 4, **options}
    return loader_on(images, config, LoaderConfig("torchvision", workers), views=views, **settings)  # type: ignore[arg-type]


def epoch(loader: Loader, number: int = 0, start_batch: int = 0) -> tuple[Tensor, Tensor]:
    loader.set_epoch(number, start_batch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


NORMALIZE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def resized(images: ImageSet, i: int, size: int = 20) -> Tensor:
    planes = torch.from_numpy(images.image(i)).permute(2, 0, 1)
    return v2.Resize((size, size), antialias=True)(planes)


@pytest.mark.parametrize("flip", list(Flip))
@pytest.mark.parametrize("workers", [0, 2])
def test_random_views_follow_the_plan(flip: Flip, workers: int) -> None:
    images = noise(10)
    found, labels = epoch(build(images, workers=workers, flip=flip, seed=7), 3)
    plan = training_plan(10, flip=flip, max_offset=4, seed=7, epoch=3, batch_size=4)
    assert torch.equal(labels, plan.indices)
    for view, i, (top, left), flipped in zip(
        found, plan.indices.tolist(), plan.offsets.tolist(), plan.flips.tolist(), strict=True
    ):
        crop = resized(images, i)[:, top : top + 16, left : left + 16]
        torch.testing.assert_close(view, NORMALIZE(crop.flip(-1) if flipped else crop), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", [16, 19, 20])
def test_center_views(resize: int) -> None:
    images = noise(10)
    loader = build(images, Views.center, resize=resize)
    found, labels = epoch(loader)
    assert labels.tolist() == list(range(10))
    assert len(loader) == 3
    for i in range(10):
        expected = NORMALIZE(v2.CenterCrop(16)(resized(images, i, resize)))
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flip", [Flip.random, Flip.none])
def test_ten_crop_views(flip: Flip) -> None:
    images = noise(6)
    crops = v2.FiveCrop(16) if flip is Flip.none else v2.TenCrop(16)
    found, labels = epoch(build(images, Views.ten_crop, flip=flip))
    assert len(found) == len(labels) * (5 if flip is Flip.none else 10)
    for i, views in enumerate(found.unflatten(0, (6, -1))):
        expected = torch.stack([NORMALIZE(crop) for crop in crops(resized(images, i))])
        torch.testing.assert_close(views, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 20, 33, 100])
def test_within_one_level_of_a_resize_in_float(size: int) -> None:
    images = noise(8, size)
    found, _ = epoch(build(images, Views.center, crop=20))
    for i in range(8):
        planes = torch.from_numpy(images.image(i)).permute(2, 0, 1).double()
        exact = v2.Normalize(MEAN, STD)(v2.Resize((20, 20), antialias=True)(planes) / 255)
        levels = (found[i] - exact) * torch.tensor(STD, dtype=torch.float64)[:, None, None] * 255
        assert levels.abs().max() <= 1 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("views", list(Views))
def test_type_and_layout(dtype: torch.dtype, channels_last: bool, views: Views) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for images, labels in build(noise(6), views, dtype=dtype, channels_last=channels_last):
        assert images.dtype == dtype
        assert labels.dtype == torch.int64
        assert images.shape[1:] == (3, 16, 16)
        assert images.is_contiguous(memory_format=layout)


def test_counts() -> None:
    for views, samples, batches in ((Views.random, 8, 2), (Views.center, 10, 3), (Views.ten_crop, 10, 3)):
        loader = build(noise(10), views)
        assert (loader.num_samples, len(loader)) == (samples, batches)
        assert len(epoch(loader)[1]) == samples
        assert len(list(loader)) == batches


def test_an_epoch_can_start_in_its_middle() -> None:
    loader = build(noise(20), workers=1)
    images, labels = epoch(loader, 2)
    rest_images, rest_labels = epoch(loader, 2, start_batch=3)
    assert torch.equal(rest_labels, labels[12:])
    assert torch.equal(rest_images, images[12:])
    assert len(loader) == 5
    assert len(epoch(loader, 3)[1]) == 20


def test_an_abandoned_epoch_does_not_affect_the_next() -> None:
    loader = build(noise(40), workers=2)
    _, labels = epoch(loader, 1)
    for _ in range(3):
        loader.set_epoch(0)
        next(iter(loader))
        assert torch.equal(epoch(loader, 1)[1], labels)


@pytest.mark.parametrize("views", list(Views))
def test_ranks_are_disjoint(views: Views) -> None:
    labels = [epoch(build(noise(22), views, rank=rank, world_size=3))[1].tolist() for rank in range(3)]
    seen = [label for rank in labels for label in rank]
    assert len(set(seen)) == len(seen) == (12 if views is Views.random else 22)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(workers: int) -> None:
    """A resumed run must draw the same dropout masks with every loader."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = build(noise(8), workers=workers)
    for number in range(2):
        epoch(loader, number)
    assert torch.equal(torch.get_rng_state(), before)


# Files


@pytest.fixture
def photographs(tmp_path: Path) -> ImageSet:
    rng = np.random.default_rng(1)
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"{i:02}.png")
        size = (1 + 7 * i, 80 - 6 * i, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(paths[-1])
    return ImageSet(np.arange(12), paths=tuple(paths))


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_many_sizes(photographs: ImageSet, workers: int) -> None:
    found, labels = epoch(build(photographs, Views.center, workers=workers, crop=20))
    for view, i in zip(found, labels.tolist(), strict=True):
        torch.testing.assert_close(view, NORMALIZE(resized(photographs, i)), rtol=0, atol=1e-6)


def data_error(loader: Loader) -> DataError:
    """The error of an epoch, without its traceback, which would keep the loader alive."""
    try:
        list(loader)
    except DataError as error:
        return error.with_traceback(None)
    raise AssertionError("no DataError")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_file_damaged_since_it_was_checked(
    photographs: ImageSet, capfd: pytest.CaptureFixture[str], workers: int, damage: str
) -> None:
    """It is named in one line; there is neither a hang nor a worker's traceback."""
    assert photographs.paths is not None
    path = photographs.paths[6]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "other":
        path.write_text("no image")
    else:
        path.unlink()
    before = set(multiprocessing.active_children())
    loader = build(photographs, Views.center, workers=workers)
    for _ in range(2):  # the workers survive the error ...
        error = data_error(loader)
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert error.__cause__ is None
    del loader
    assert set(multiprocessing.active_children()) == before  # ... but not the loader
    assert capfd.readouterr().err == ""


# Processes


@pytest.mark.parametrize("when", ["before a batch is requested", "meanwhile"])
def test_a_killed_worker_is_reported_with_the_next_batch_and_nowhere_else(when: str) -> None:
    loader = build(noise(4000), workers=2)
    batches = iter(loader)
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    if when == "before a batch is requested":
        for worker in workers:
            worker.join()  # stands for a training step; no error is raised here
    with pytest.raises(DataError, match=r"loader.workers=2: a worker process died") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_labels_take_no_file_descriptors() -> None:
    """An evaluation keeps those of all its batches, and 1,024 is a common limit."""
    loader = build(noise(200), workers=1)
    batches = iter(loader)
    kept = [next(batches)[1] for _ in range(10)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept += [labels for _, labels in batches]
    assert len(kept) == 50
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_batch_that_cannot_be_sent_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /dev/shm is full; the workers inherit what is patched."""
    full = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"

    def share(storage: torch.UntypedStorage) -> None:
        raise RuntimeError(full)

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", share)
    with pytest.raises(RuntimeError) as caught:
        list(build(noise(20), workers=1))
    assert str(caught.value) == full


def test_too_little_shared_memory_is_noticed_before_the_workers_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two batches for each worker, and the one in use; each is of 4 images of 16 x 16 in 3 bytes a pixel."""
    needed = (2 * 2 + 1) * 4 * 16 * 16 * 3
    usage = shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    build(noise(40), workers=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(ShortageError, match=r"loader.workers=2: up to 5 batches wait in shared memory"):
        build(noise(40), workers=2)
    build(noise(16), workers=2)  # there are four batches
    build(noise(40), workers=0)


def test_no_worker_outlives_its_loader() -> None:
    before = set(multiprocessing.active_children())
    loader = build(noise(8), workers=2)
    epoch(loader)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    gc.disable()  # the garbage collector would hide a reference cycle around the loader
    try:
        del loader
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive()
    finally:
        gc.enable()


# Runs in another process: all threads are busy before workers are forked; nothing is closed at the end.
_AFTER_THREADS = """
import numba, numpy as np, torch
from fastalex.config import DataConfig, LoaderConfig, RuntimeConfig
from fastalex.data import ImageSet, Views, build_loader
from fastalex.runtime import choose_runtime

@numba.njit(parallel=True)
def total(x):
    s = 0.0
    for i in numba.prange(len(x)):
        s += x[i]
    return s

def busy():
    torch.ones(1_000_000).exp().sum()
    total(np.ones(1_000_000))

if __name__ == "__main__":
    busy()
    images = ImageSet(np.arange(64), pixels=np.zeros((64, 32, 32, 3), np.uint8))
    data = DataConfig(name="test", resize=256, crop=224)
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    loaders = [
        build_loader(
            images, data, LoaderConfig("torchvision", 2), views=views, batch_size=8, runtime=runtime
        )
        for views in (Views.random, Views.center)
    ]
    for epoch in range(3):
        for loader in loaders:
            loader.set_epoch(epoch)
            for _ in loader:
                busy()
    print("done")
"""


def test_workers_after_threads_and_a_clean_exit(tmp_path: Path) -> None:
    """OpenMP's threads do not survive the fork, which may not hang; workers may not survive the program."""
    script = tmp_path / "script.py"
    script.write_text(_AFTER_THREADS)
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    output, errors = process.communicate(timeout=300)  # returns when no process holds the pipes
    assert (process.returncode, output, errors) == (0, "done\n", "")
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes are left")
