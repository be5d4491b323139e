"""The cache of image files: its contents, when an entry is replaced, crashes and concurrent processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex.data import cache
from fastalex.data.cache import cache_folder, read_files
from fastalex.data.decode import decode_image
from fastalex.data.workers import AHEAD, map_unordered
from fastalex.errors import DataError


@pytest.fixture
def folder(cache_root: Path) -> Path:
    """fastalex's cache folder."""
    return cache_root / "fastalex"


def write_images(root: Path, count: int = 5, size: tuple[int, int] = (6, 7)) -> list[Path]:
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(count)
    paths = [root / f"{i:04}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return paths


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def read(root: Path, paths: list[Path]) -> cache.FileContents:
    return read_files(root, [str(path) for path in paths], progress=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of files of each read that the cache did not serve."""
    calls: list[int] = []
    original = cache.read_uncached

    def counted(paths: list[Path], *, progress: str) -> cache.FileContents:
        calls.append(len(paths))
        return original(paths, progress=progress)

    monkeypatch.setattr(cache, "read_uncached", counted)
    return calls


@pytest.mark.parametrize("count", [1, 5, 300])  # 300: more than one task, so in several processes
def test_pixels_of_small_files(tmp_path: Path, reads: list[int], count: int) -> None:
    paths = write_images(tmp_path / "images", count)
    expected = np.stack([decode_image(path) for path in paths])
    first, again = read(tmp_path, paths), read(tmp_path, paths)
    assert reads == [count]
    assert first.damaged == again.damaged == {}
    assert np.array_equal(first.pixels, expected)
    assert np.array_equal(again.pixels, expected)
    assert isinstance(again.pixels, np.memmap)
    assert not again.pixels.flags.writeable


def test_damaged_files_are_cached_by_index(tmp_path: Path, reads: list[int]) -> None:
    paths = write_images(tmp_path / "images", 200)
    paths[0].write_text("no image")
    paths[150].write_bytes(paths[150].read_bytes()[:60])
    for _ in range(2):
        contents = read(tmp_path, paths)
        assert list(contents.damaged) == [0, 150]
        assert contents.damaged[0] == "not an image"
        assert contents.pixels is not None
        assert not contents.pixels[[0, 150]].any()
        assert np.array_equal(contents.pixels[149], decode_image(paths[149]))
    assert len(reads) == 1


def test_mixed_sizes_are_only_checked(tmp_path: Path, reads: list[int]) -> None:
    paths = write_images(tmp_path / "images", 200)
    Image.new("RGB", (9, 9)).save(paths[101])  # not among the files from which the size is guessed
    paths[199].write_text("no image")
    for _ in range(2):
        contents = read(tmp_path, paths)
        assert contents.pixels is None
        assert list(contents.damaged) == [199]
    assert len(reads) == 1


@pytest.mark.parametrize(("limit", "value"), [("SMALL_IMAGE", 6 * 7 * 3), ("DECODED", 5 * 6 * 7 * 3)])
def test_large_images_are_only_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    paths = write_images(tmp_path / "images")
    monkeypatch.setattr(cache, limit, value - 1)
    assert read(tmp_path, paths).pixels is None
    monkeypatch.setattr(cache, limit, value)
    Image.new("RGB", (7, 6)).save(paths[0])  # a changed source gets another entry
    assert read(tmp_path, paths).pixels is not None


def _rewrite_unnoticeably(paths: list[Path]) -> list[Path]:
    """Write other pixels to a file, with the same size and modification time."""
    stat, data = paths[2].stat(), paths[2].read_bytes()
    paths[2].write_bytes(paths[3].read_bytes().ljust(len(data), b"\0")[: max(len(data), 1)])
    os.utime(paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert paths[2].stat().st_size == stat.st_size
    return paths


def _remove(paths: list[Path]) -> list[Path]:
    paths[1].unlink()
    return paths[:1] + paths[2:]


def _add(paths: list[Path]) -> list[Path]:
    Image.new("RGB", (7, 6), "#102030").save(paths[0].parent / "zzz.png")
    return [*paths, paths[0].parent / "zzz.png"]


def _exchange(paths: list[Path]) -> list[Path]:
    spare = paths[0].parent / "spare"
    paths[0].rename(spare)
    paths[1].rename(paths[0])
    spare.rename(paths[1])
    return paths


@pytest.mark.parametrize("change", [_rewrite_unnoticeably, _remove, _add, _exchange])
def test_a_changed_source_is_noticed(
    tmp_path: Path, folder: Path, reads: list[int], change: Callable[[list[Path]], list[Path]]
) -> None:
    paths = write_images(tmp_path / "images")
    read(tmp_path, paths)
    paths = change(paths)
    contents = read(tmp_path, paths)
    assert len(reads) == 2
    assert contents.pixels is not None
    for i, path in enumerate(paths):
        if i not in contents.damaged:
            assert np.array_equal(contents.pixels[i], decode_image(path))
    assert len(entries(folder)) == 1  # the old entry is removed


def test_each_source_has_an_entry(tmp_path: Path, folder: Path, reads: list[int]) -> None:
    sources = [(tmp_path / name, write_images(tmp_path / name)) for name in ("a", "b")]
    for root, paths in sources * 2:
        read(root, paths)
    assert len(reads) == 2
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("name", ["pixels.npy", "index.json"])
@pytest.mark.parametrize("data", [None, b"", b"{}", b"[1]", b"\x93NUMPY\x01\x00"])
def test_a_damaged_entry_is_rebuilt(
    tmp_path: Path, folder: Path, reads: list[int], name: str, data: bytes | None
) -> None:
    paths = write_images(tmp_path / "images")
    read(tmp_path, paths)
    file = entries(folder)[0] / name
    if data is None:
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(data)
    contents = read(tmp_path, paths)
    assert len(reads) == 2
    assert np.array_equal(contents.pixels, np.stack([decode_image(path) for path in paths]))
    read(tmp_path, paths)
    assert len(reads) == 2


def test_the_source_is_not_written_to(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*")}
    folder_time = (tmp_path / "images").stat().st_mtime_ns
    read(tmp_path / "images", paths)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*")} == before
    assert (tmp_path / "images").stat().st_mtime_ns == folder_time


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system")]
)
def test_without_a_writable_cache(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reads: list[int],
    number: int,
    reason: str,
) -> None:
    paths = write_images(tmp_path / "images")

    def refuse(path: Path, *_: object, **__: object) -> None:  # chmod would not do: tests may run as root
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for progress in (True, False):  # the process that shows progress is the only one that warns
        contents = read_files(tmp_path, list(map(str, paths)), progress=progress)
        assert np.array_equal(contents.pixels, np.stack([decode_image(path) for path in paths]))
    assert len(reads) == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "fastalex: warning: the images will be read again by the next run: "
        f"{folder} cannot be written ({reason}); set XDG_CACHE_HOME to a writable folder"
    ]


def test_a_full_disk_leaves_no_entry(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_images(tmp_path / "images")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    contents = read_files(tmp_path, list(map(str, paths)), progress=True)
    assert contents.pixels is not None
    assert f"{folder} cannot be written (No space left on device)" in capsys.readouterr().err
    assert entries(folder) == []


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    for value in ("", "relative"):  # the XDG specification says to ignore these
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path("/somewhere/.cache/fastalex")


def test_a_file_that_vanished(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images")
    paths[3].unlink()
    with pytest.raises(DataError, match=r"0003.png cannot be read: No such file"):
        read(tmp_path, paths)


# Runs in another process: reads the files of a folder slowly; prints when reading starts or writing stops.
_SLOWLY = """
import sys, time
from pathlib import Path
import numpy as np
from fastalex.data import cache
root, stop = Path(sys.argv[1]), sys.argv[2]
read, save = cache.read_uncached, np.save
def slow_read(*args, **kwargs):
    print("reading", flush=True)
    time.sleep(1 if stop == "no" else 0)
    return read(*args, **kwargs)
def half_save(file, array):
    save(file, array[: len(array) // 2])
    file.flush()
    print("half", flush=True)
    time.sleep(600)
cache.read_uncached = slow_read
if stop == "save":
    np.save = half_save
contents = cache.read_files(root, sorted(map(str, root.iterdir())), progress=False)
print("pixels", int(contents.pixels.sum()), flush=True)
"""


def start_slowly(root: Path, stop: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _SLOWLY, root, stop], stdout=subprocess.PIPE, text=True)


def test_killed_while_writing(tmp_path: Path, folder: Path, reads: list[int]) -> None:
    paths = write_images(tmp_path / "images")
    process = start_slowly(tmp_path / "images", "save")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["reading\n", "half\n"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(entries(folder)) == 1  # an incomplete entry ...
    contents = read(tmp_path / "images", paths)
    assert len(reads) == 1  # ... is not used ...
    assert np.array_equal(contents.pixels, np.stack([decode_image(path) for path in paths]))
    assert [sorted(path.name for path in entry.iterdir()) for entry in entries(folder)] == [
        ["index.json", "pixels.npy"]
    ]  # ... and is removed


def test_two_processes_at_once(tmp_path: Path, folder: Path) -> None:
    """One reads while the other waits."""
    paths = write_images(tmp_path / "images")
    processes = [start_slowly(tmp_path / "images", "no") for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    total = sum(int(decode_image(path).sum()) for path in paths)
    assert all(output.endswith(f"pixels {total}\n") for output in outputs)
    assert sum("reading" in output for output in outputs) == 1
    assert len(entries(folder)) == 1


def _square(number: int) -> int:
    return number * number


def _threaded(size: int) -> float:
    return float(torch.ones(size).exp().sum())


def _note(path: Path) -> None:
    path.touch()


def _refuse(number: int) -> int:
    raise DataError(f"number {number}")


def _die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_map_unordered(workers: int) -> None:
    assert sorted(map_unordered(_square, range(20), workers)) == [(i, i * i) for i in range(20)]
    with pytest.raises(DataError, match="number 1"):
        list(map_unordered(_refuse, [1, 1], workers))


def test_workers_do_not_run_ahead_of_a_slow_caller(tmp_path: Path) -> None:
    """Results that wait for the caller would fill the memory."""
    workers, items = 2, 60
    for taken, _ in enumerate(map_unordered(_note, [tmp_path / str(i) for i in range(items)], workers)):
        time.sleep(0.02)  # in which the workers could finish all items
        assert len(list(tmp_path.iterdir())) <= taken + AHEAD * workers
    assert len(list(tmp_path.iterdir())) == items


def test_a_worker_may_use_torch_after_the_parent_did() -> None:
    """OpenMP's threads do not survive a fork; a worker that waits for them would hang."""
    expected = _threaded(1_000_000)
    assert list(dict(map_unordered(_threaded, [1_000_000] * 2, 2)).values()) == pytest.approx([expected] * 2)


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(DataError, match="was killed"):
        list(map_unordered(_die, range(4), 2))


# Runs in another process: workers that never finish and print their process ids.
_ENDLESS = """
import os, sys, time
from fastalex.data.workers import map_unordered
sys.modules["endless"] = sys.modules["__main__"]
def endless(i):
    os.write(1, b"%d\\n" % os.getpid())  # one write, so that the workers' lines do not mix
    time.sleep(600)
list(map_unordered(endless, range(2), 2))
"""


def test_workers_die_with_their_parent() -> None:
    process = subprocess.Popen([sys.executable, "-c", _ENDLESS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout.read() == ""  # returns when the last worker has closed it
    process.stdout.close()
    for worker in workers:
        while Path(f"/proc/{worker}").exists() and _state(worker) != "Z":
            time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"
