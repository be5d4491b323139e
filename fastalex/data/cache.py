"""A cache of image files: the pixels of small images, and which files are damaged.

Every file of a data set is read in full before training starts, by one process per core. If all images have
the same size, at most ``SMALL_IMAGE`` bytes decoded, and together take at most ``DECODED`` bytes and a
quarter of the machine's memory, their pixels are stored and no file is opened again. Otherwise only the
damaged files are recorded. In both cases damaged files are reported before the first step, with every loader.

The cache is ``$XDG_CACHE_HOME/fastalex`` (by default ``~/.cache/fastalex``). An entry is a folder named by a
digest of the source folder and a digest of its files' names, sizes, modification and change times: a changed
source gets a new entry, and the old one is removed. An entry is written under a temporary name, synced and
renamed, so that a crash leaves no incomplete entry; under a lock one process builds it while others wait.
Without a writable cache, files are read again in each run.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastalex.data.decode import DamagedImageError, check_image, decode_image, is_dangling
from fastalex.data.workers import map_unordered
from fastalex.errors import DataError
from fastalex.runtime import available_cores

SMALL_IMAGE = 64 << 10  # largest decoded image that is stored, in bytes: 147 x 147 pixels
DECODED = 4 << 30  # largest total of decoded images, in bytes

_FORMAT = 2  # version of the cache's contents; increase it when decode_image's output changes
_CHUNK = 128  # files per task of a worker process
_Shape = tuple[int, int]  # height and width


@dataclass(frozen=True)
class FileContents:
    """The contents of N files.

    Attributes:
        pixels: uint8 (N, H, W, 3), zero for damaged files, read-only if mapped from the cache; None if the
            images are too large or of different sizes.
        damaged: the reason for each damaged file, by the file's index.
    """

    pixels: NDArray[np.uint8] | None
    damaged: dict[int, str]


def read_files(root: Path, paths: Sequence[str], *, progress: bool = True) -> FileContents:
    """Return the contents of image files: from the cache, or else by reading all of them.

    Damaged files raise no error; they are part of the result.

    Args:
        root: the folder that holds all files; its path identifies the cache entry.
        paths: N files below ``root``.
        progress: show a progress bar while the files are read, and a warning if they cannot be cached.

    Raises:
        DataError: a file cannot be opened.
    """
    source = blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    entry = cache_folder() / f"{source}-{_fingerprint(root, paths)}"
    contents = _load(entry, len(paths))
    if contents is not None:
        return contents
    with suppress(OSError):  # raised again below, when the entry is stored
        entry.parent.mkdir(parents=True, exist_ok=True)
    with locked(entry.with_name(f"{source}.lock")):
        contents = _load(entry, len(paths))  # another process may have stored it meanwhile
        if contents is None:
            contents = read_uncached(paths, progress=str(root) if progress else "")
            try:
                entry.parent.mkdir(parents=True, exist_ok=True)
                _remove_other_entries(entry, source)
                _store(entry, root, contents)
            except OSError as error:
                if progress:
                    print(
                        "fastalex: warning: the images will be read again by the next run: "
                        f"{entry.parent} cannot be written ({error.strerror or error}); "
                        "set XDG_CACHE_HOME to a writable folder",
                        file=sys.stderr,
                    )
    return contents


def read_uncached(
    paths: Sequence[Path | str], *, progress: str = "", unreadable: bool = False
) -> FileContents:
    """Return the contents of image files by reading all of them, in worker processes.

    Args:
        paths: N files.
        progress: what a progress bar says is being read; empty for none.
        unreadable: whether a file that cannot be opened counts as damaged.

    Raises:
        DataError: a file cannot be opened, unless it counts as damaged.
    """
    caught = DataError if unreadable else DamagedImageError
    shape = common_small_shape(paths, caught)
    pixels = None if shape is None else np.zeros((len(paths), *shape, 3), np.uint8)
    damaged: dict[int, str] = {}
    tasks = [(paths[i : i + _CHUNK], shape, caught) for i in range(0, len(paths), _CHUNK)]
    with tqdm(
        total=len(paths),
        desc=f"{'checking' if shape is None else 'decoding'} {progress}",
        unit="image",
        disable=not progress,
    ) as bar:
        for task, (chunk, reasons) in map_unordered(_read_chunk, tasks, available_cores()):
            first = task * _CHUNK
            damaged.update({first + i: reason for i, reason in reasons.items()})
            if chunk is None:
                pixels = None
            elif pixels is not None:
                pixels[first : first + len(chunk)] = chunk
            bar.update(len(tasks[task][0]))
    return FileContents(pixels, dict(sorted(damaged.items())))


def common_small_shape(
    paths: Sequence[Path | str], caught: type[DataError] = DamagedImageError
) -> tuple[int, int] | None:
    """Guess from about 16 files spread over a list whether all images are small and of one size.

    Args:
        paths: the files.
        caught: errors of files that are passed over.

    Returns:
        Height and width, in pixels; None if the images are not to be held in memory.
    """
    shapes = set()
    for path in paths[:: max(1, len(paths) // 16)]:
        try:
            shapes.add(check_image(path))
        except caught:
            continue
    if len(shapes) != 1:
        return None
    height, width = shapes.pop()
    size = height * width * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = size <= SMALL_IMAGE and size * len(paths) <= min(DECODED, memory // 4)
    return (height, width) if fits else None


def cache_folder() -> Path:
    """Return fastalex's cache folder, by the XDG base directory specification; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "fastalex"  # noqa: PTH117


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file. If that is impossible, the block runs without a lock.

    The system releases the lock if the process is killed.

    Args:
        path: the lock file, which is created if needed.
    """
    try:
        file = path.open("w")
    except OSError:
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_state(path: Path | str, name: Path | str) -> bytes:
    """Return bytes that change when a file is renamed, replaced or written to, for a digest.

    Args:
        path: the file.
        name: the path to include in the bytes.

    Raises:
        DataError: the file does not exist or is not accessible. A link to a file that does not exist is a
            damaged image.
    """
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError as error:
        if is_dangling(path):
            return os.fsencode(name) + b"\0missing\n"
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return os.fsencode(name) + f"\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode()


def _fingerprint(root: Path, paths: Sequence[str]) -> str:
    """Return a digest that changes when a file is added, removed, renamed, replaced or written to."""
    digest = blake2b(f"{_FORMAT}\n".encode(), digest_size=16)
    prefix = os.path.join(root, "")  # noqa: PTH118
    for path in paths:
        digest.update(file_state(path, path.removeprefix(prefix)))
    return digest.hexdigest()


def _read_chunk(
    task: tuple[Sequence[Path | str], _Shape | None, type[DataError]],
) -> tuple[NDArray[np.uint8] | None, dict[int, str]]:
    """Read the files of one task: their pixels, and the reasons for damaged files by index.

    The task is the files, the shape of their images, and the errors that mean a damaged file. After the first
    image of another shape, the remaining files are only checked and the pixels are None.
    """
    paths, shape, caught = task
    pixels = None if shape is None else np.zeros((len(paths), *shape, 3), np.uint8)
    damaged = {}
    for i, path in enumerate(paths):
        try:
            if pixels is None:
                check_image(path)
                continue
            image = decode_image(path)
            if image.shape == pixels.shape[1:]:
                pixels[i] = image
            else:
                pixels = None
        except caught as error:
            damaged[i] = error.reason if isinstance(error, DamagedImageError) else str(error)
    return pixels, damaged


def _load(entry: Path, count: int) -> FileContents | None:
    """Return the contents of a cache entry, or None if it is missing or damaged."""
    try:
        index = json.loads((entry / "index.json").read_text())
        damaged = {int(i): reason for i, reason in index["damaged"].items()}
        if not index["decoded"]:
            return FileContents(None, damaged)
        pixels = np.load(entry / "pixels.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != count:
        return None
    return FileContents(pixels, damaged)


def _store(entry: Path, root: Path, contents: FileContents) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    try:
        if contents.pixels is not None:
            with (temporary / "pixels.npy").open("wb") as file:
                np.save(file, contents.pixels)
                file.flush()
                os.fsync(file.fileno())
        index = {
            "source": str(root),
            "decoded": contents.pixels is not None,
            "damaged": contents.damaged,
        }
        with (temporary / "index.json").open("w") as text:
            json.dump(index, text)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(temporary)
        temporary.rename(entry)
        _sync_folder(entry.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_other_entries(entry: Path, source: str) -> None:
    """Remove a source's old entries, and temporary ones that a crash has left."""
    for old in entry.parent.glob(f"{source}-*"):
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
