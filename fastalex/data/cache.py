"""Image files read once: small ones are kept decoded, of the others only which are damaged.

Every file of a data set is read in full before training starts, by as many processes as there are cores. If
all have one size of at most ``SMALL_IMAGE`` decoded bytes, and together they take no more than ``DECODED``
bytes and a quarter of the machine's memory, their pixels are kept and no file is opened again. Either way a
damaged file is known by its name before the first step, whatever the loader.

The result is written under ``$XDG_CACHE_HOME/fastalex`` (``~/.cache/fastalex``), in a folder named after the
source folder and a digest of all its files' names, sizes, modification and change times: a changed source
has another name, and the old entry is removed. An entry is written beside its place, synced and renamed, so
a crash leaves nothing that looks whole; a lock lets one process build while others wait for it. Without a
writable cache everything works, only the reading is repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastalex.data.decode import DamagedImageError, check_image, decode_image
from fastalex.data.workers import map_unordered
from fastalex.errors import DataError
from fastalex.runtime import available_cores

SMALL_IMAGE = 64 << 10  # bytes of a decoded image: 147 x 147 pixels
DECODED = 4 << 30  # bytes of all of them

_FORMAT = 1  # of the cache: raise it whenever decode_image's policy changes
_CHUNK = 128  # files that a process takes at a time
_Shape = tuple[int, int]


@dataclass(frozen=True)
class FileContents:
    """What reading N files gave.

    Attributes:
        pixels: uint8 (N, H, W, 3), zero where damaged, read-only where mapped from the cache; None for files
            too large or of different sizes.
        damaged: why, by the position of the file.
    """

    pixels: NDArray[np.uint8] | None
    damaged: dict[int, str]


def read_files(root: Path, paths: Sequence[Path], *, progress: bool = True) -> FileContents:
    """Reads all of these files, which lie under ``root``, or recalls what they held.

    Raises:
        DataError: a file cannot be opened. Damaged contents are no error here: they are returned.
    """
    source = blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    entry = cache_folder() / f"{source}-{_fingerprint(root, paths)}"
    contents = _load(entry, len(paths))
    if contents is not None:
        return contents
    with suppress(OSError):  # said when the entry is stored
        entry.parent.mkdir(parents=True, exist_ok=True)
    with locked(entry.with_name(f"{source}.lock")):
        contents = _load(entry, len(paths))  # another process may have built it meanwhile
        if contents is None:
            contents = _read(root, paths, progress=progress)
            try:
                _remove_other_entries(entry, source)
                _store(entry, root, contents)
            except OSError as error:
                warnings.warn(
                    f"the decoded images are not kept for the next run: {entry.parent} cannot be written "
                    f"({error.strerror or error}); set XDG_CACHE_HOME to a folder that can",
                    stacklevel=2,
                )
    return contents


def cache_folder() -> Path:
    """Where entries lie, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "fastalex"  # noqa: PTH117


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, which the system releases if we are killed; none where that is impossible."""
    try:
        file = path.open("w")
    except OSError:
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(root: Path, paths: Sequence[Path]) -> str:
    """Changes when any file is added, removed, renamed, replaced or written to."""
    digest = blake2b(f"{_FORMAT}\n".encode(), digest_size=16)
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        digest.update(os.fsencode(path.relative_to(root)))
        digest.update(f"\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _read(root: Path, paths: Sequence[Path], *, progress: bool) -> FileContents:
    shape = _common_small_shape(paths)
    pixels = None if shape is None else np.zeros((len(paths), *shape, 3), np.uint8)
    damaged: dict[int, str] = {}
    tasks = [(paths[i : i + _CHUNK], shape) for i in range(0, len(paths), _CHUNK)]
    with tqdm(
        total=len(paths),
        desc=f"{'checking' if shape is None else 'decoding'} {root}",
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


def _read_chunk(
    task: tuple[Sequence[Path], _Shape | None],
) -> tuple[NDArray[np.uint8] | None, dict[int, str]]:
    """The pixels of some files (None from the first that is not of this shape on), and what is damaged."""
    paths, shape = task
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
        except DamagedImageError as error:
            damaged[i] = error.reason
    return pixels, damaged


def _common_small_shape(paths: Sequence[Path]) -> _Shape | None:
    """The size of a few files spread over the list, if it is one and small: the guess to start with."""
    shapes = set()
    for path in paths[:: max(1, len(paths) // 16)]:
        try:
            shapes.add(check_image(path))
        except DamagedImageError:
            continue
    if len(shapes) != 1:
        return None
    height, width = shapes.pop()
    size = height * width * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = size <= SMALL_IMAGE and size * len(paths) <= min(DECODED, memory // 4)
    return (height, width) if fits else None


def _load(entry: Path, count: int) -> FileContents | None:
    """The entry, or None if there is none that is whole."""
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
    """Removes what this source's earlier states, or a crash while one was written, left behind."""
    for old in entry.parent.glob(f"{source}-*"):
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
