"""Properties of the FFCV loader and its files alone; those of all loaders are in test_agreement.py."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import types
from PIL import Image
from torch.nn.functional import interpolate

from fastalex.config import DataConfig, Fit, Flip, LoaderConfig
from fastalex.data import ImageSet, Views, write_beton
from fastalex.errors import DataError, MissingDependencyError, OutputError, ShortageError
from tests.commands import outcome
from tests.runtimes import loader_on

installed = pytest.mark.skipif(
    find_spec("ffcv") is None, reason="FFCV is not installed: .ci/install-loaders PYTHON"
)
DATA = DataConfig(name="test", resize=40, crop=32, flip=Flip.none)


def ffcv_loader(images: ImageSet, folder: Path, views: Views = Views.center, **options: Any) -> Any:
    settings = {"data": DATA, "workers": 1, "batch_size": 4, **options}
    loader = LoaderConfig(name="ffcv", workers=settings.pop("workers"), beton=str(folder))
    return loader_on(images, settings.pop("data"), loader, views=views, **settings)


def arrays(count: int = 20, seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return ImageSet(np.arange(count), pixels=pixels)


@installed
def test_thread_counts_are_preserved(tmp_path: Path) -> None:
    """Also with too many workers. In a process of its own, because FFCV sets them at its first import."""
    program = f"""
import numba, numpy as np, torch
from fastalex.config import DataConfig, LoaderConfig, RuntimeConfig
from fastalex.data import ImageSet, Views, build_loader
from fastalex.runtime import choose_runtime
runtime = choose_runtime(RuntimeConfig(device="cpu", threads=3))
numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
def threads():
    return torch.get_num_threads(), numba.get_num_threads()
before = threads()
images = ImageSet(np.arange(8), pixels=np.zeros((8, 32, 32, 3), np.uint8))
for workers in (1, 2, 1000):
    loader = build_loader(images, DataConfig(name="test", resize=32, crop=32),
                          LoaderConfig(name="ffcv", workers=workers, beton={str(tmp_path)!r}),
                          views=Views.center, batch_size=2, runtime=runtime)
    assert threads() == before, (workers, "built", threads())
    for _ in loader:
        assert threads() == before, (workers, "first batch", threads())
    assert threads() == before, (workers, "epoch", threads())
print("kept")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("kept\n"), done.stderr


@installed
def test_numbas_shared_types_are_unchanged(tmp_path: Path) -> None:
    """FFCV's own reader would mark Numba's shared type uint8[::1] as read-only."""
    shared = types.uint8[::1]  # Numba returns the same object as long as a reference to it exists
    before = hash(shared)
    for _ in ffcv_loader(arrays(), tmp_path):
        pass
    assert shared.mutable
    assert hash(shared) == before


@installed
def test_an_abandoned_epoch_leaves_no_thread(tmp_path: Path) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    def running() -> int:  # not active_count(), which includes threads of pytest and of other tests
        return sum(isinstance(thread, EpochIterator) for thread in threading.enumerate())

    loader = ffcv_loader(arrays(80), tmp_path)
    epoch = iter(loader)
    next(epoch)
    assert running()  # otherwise nothing below could fail
    epoch.close()
    for taken in (1, len(loader) - 4, len(loader) - 3, len(loader) - 1):
        list(islice(loader, taken))
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)  # FFCV's thread checks every half second whether to stop
    assert running() == 0


@installed
def test_an_error_in_ffcvs_thread_is_raised_and_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    def fail(*_: Any) -> None:
        raise RuntimeError("in the thread")

    loader = ffcv_loader(arrays(), tmp_path)
    monkeypatch.setattr(EpochIterator, "run_pipeline", fail)
    with pytest.raises(RuntimeError, match="in the thread"):
        list(loader)


@installed
def test_files_are_resized_once_and_rounded(files: ImageSet, tmp_path: Path) -> None:
    """The pixels of a .beton file are whole grey levels, within half a level of the resized image."""
    data = DataConfig(name="test", resize=40, crop=40, mean=[0.0] * 3)
    found = torch.cat([batch for batch, _ in ffcv_loader(files, tmp_path, data=data)]).double() * 255
    for i, pixels in enumerate(found):
        planes = torch.from_numpy(files.image(i)).permute(2, 0, 1)[None].double()
        exact = interpolate(planes, (40, 40), mode="bilinear", antialias=True)[0]
        assert (pixels - exact).abs().max() < 0.501
        torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)


@installed
def test_a_file_is_written_once_and_reused(tmp_path: Path) -> None:
    path = ffcv_loader(arrays(), tmp_path).beton
    written = path.stat().st_mtime_ns, path.stat().st_ino
    again = ffcv_loader(arrays(), tmp_path, views=Views.random, batch_size=7).beton
    assert again == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written


@installed
def test_a_changed_source_has_another_file(files: ImageSet, tmp_path: Path) -> None:
    paths = {ffcv_loader(arrays(), tmp_path).beton, ffcv_loader(arrays(seed=1), tmp_path).beton}
    relabelled = ImageSet(np.arange(20)[::-1].copy(), pixels=arrays().pixels)
    paths.add(ffcv_loader(relabelled, tmp_path).beton)
    paths.add(ffcv_loader(files, tmp_path).beton)
    (before, _), *_ = ffcv_loader(files, tmp_path)
    Image.new("RGB", (60, 50), "white").save(files.paths[0])
    loader = ffcv_loader(files, tmp_path)
    paths.add(loader.beton)
    (after, _), *_ = loader
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])
    paths.add(ffcv_loader(files, tmp_path, data=DataConfig(name="test", resize=48, crop=32)).beton)
    kept = replace(DATA, fit=Fit.shorter_side)
    paths.add(ffcv_loader(files, tmp_path, data=kept).beton)
    assert len(paths) == 7
    # Images in memory are stored in their own size, whatever becomes of them.
    assert ffcv_loader(arrays(), tmp_path, data=kept).beton in paths


@installed
@pytest.mark.parametrize("kept", [0, 10, 1000, 10_000, 2_000_000, -1])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = ffcv_loader(arrays(), tmp_path).beton
    os.truncate(path, kept if kept >= 0 else path.stat().st_size - 1)
    with pytest.raises(DataError, match=rf"{path} is not a whole \.beton file; delete it"):
        ffcv_loader(arrays(), tmp_path)


@installed
def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    path = ffcv_loader(arrays(), tmp_path).beton
    other = ffcv_loader(ImageSet(np.arange(20) + 1, pixels=arrays().pixels), tmp_path).beton
    other.replace(path)
    with pytest.raises(DataError, match="was not made from these images"):
        ffcv_loader(arrays(), tmp_path)
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    with pytest.raises(DataError, match=r"is not a whole \.beton file"):
        ffcv_loader(arrays(), tmp_path)


@installed
def test_a_damaged_image_is_named_and_leaves_no_file(files: ImageSet, tmp_path: Path) -> None:
    files.paths[5].write_bytes(files.paths[5].read_bytes()[:500])
    folder = tmp_path / "beton"
    with pytest.raises(DataError, match=r"5\.jpg is not a whole image"):
        ffcv_loader(files, folder)
    assert not [path for path in folder.iterdir() if path.suffix == ".beton"]


@installed
def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    images = arrays(4000)  # 12 MB
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            ffcv_loader(images, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("**/*.beton"))


@installed
def test_too_little_shared_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV keeps a few bytes of each image there, and would be killed where it writes them."""
    usage = shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ShortageError, match="bytes of shared memory, and /dev/shm has 100 free"):
        ffcv_loader(arrays(), tmp_path)
    assert not list(tmp_path.glob("**/*.beton"))


@installed
def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/beton: cannot be created .*; loader\.beton=FOLDER"):
        ffcv_loader(arrays(), tmp_path / "file" / "beton")


WRITE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore SIGINT by default
import sys, time
import numpy as np
from fastalex.config import DataConfig, LoaderConfig
from fastalex.data import ImageSet, beton
pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
images = ImageSet(np.arange(20), pixels=pixels)
data = DataConfig(name="test", resize=40, crop=32)
pause, folder = float(sys.argv[1]), sys.argv[2]
inner = beton.handle_sample
def slow(*arguments):
    if pause:
        print("writing", flush=True)
    time.sleep(pause)
    inner(*arguments)
beton.handle_sample = slow
print(beton.ensure_beton(images, data, LoaderConfig(name="ffcv", beton=folder)))
"""


@installed
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda sent: sent.name)
def test_an_interrupted_write_leaves_no_incomplete_file(sent: signal.Signals, tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE, "0.2", tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(3):
        assert writer.stdout.readline() == "writing\n"
    writer.send_signal(sent)
    writer.wait()
    writer.stdout.close()
    hidden = list(tmp_path.glob(".*.beton"))
    assert len(hidden) == (1 if sent == signal.SIGKILL else 0)
    assert not [path for path in tmp_path.glob("*.beton") if path not in hidden]
    loader = ffcv_loader(arrays(), tmp_path)  # the next loader writes the file and removes the leftovers
    assert list(tmp_path.glob("*.beton")) == [loader.beton]
    assert not list(tmp_path.glob(".*.beton"))
    assert sum(len(labels) for _, labels in loader) == 20


@installed
def test_only_one_of_several_processes_writes(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, "0.05", tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [writer.communicate()[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(lines.count("writing") for lines in outputs) == [0, 20]


@installed
def test_the_command_writes_what_the_loader_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data=digits", "data.resize=32", "data.crop=28", "seed=3", f"loader.beton={tmp_path}"]
    command = [sys.executable, "-m", "fastalex.data.write_beton", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = set(tmp_path.glob("*.beton"))
    assert len(written) == 3
    assert all(str(path) in done.stdout for path in written)
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in written} | {
        path.with_suffix(".lock").name for path in written
    }
    status, _, err = outcome(write_beton.main, [*overrides, "data.crops=3"], monkeypatch, capsys)
    assert status == 2
    assert err.startswith("fastalex: error: ")
    assert err.count("\n") == 1


def test_a_missing_package_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fastalex.data.ffcv", "fastalex.data.beton", "ffcv.fields", "ffcv.loader", "ffcv.reader"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(
        MissingDependencyError, match=r'pip install "fastalex\[ffcv\]".*libopencv-dev'
    ) as caught:
        ffcv_loader(arrays(), tmp_path)
    assert "\n" not in str(caught.value)
