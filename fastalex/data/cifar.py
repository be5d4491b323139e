"""CIFAR-10 from the published pickles, which can be downloaded, or from a tree of image files."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from fastalex.config import DataConfig
from fastalex.data.cache import cache_folder, locked
from fastalex.data.decode import image_extensions
from fastalex.data.folders import read_parts, scan_classes, subfolders
from fastalex.data.imageset import DataSplits, ImageSet
from fastalex.data.splits import check_labels, split
from fastalex.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_BATCHES = "cifar-10-batches-py"
_PARTIAL = ".cifar10-"  # prefix of the folder of an unfinished download
_TIMEOUT = 60  # seconds without data after which a download fails


class _Batches(CIFAR10):
    """torchvision's reader, given the folder of the pickles instead of its parent."""

    base_folder = ""


def load_cifar10(config: DataConfig, seed: int, *, progress: bool) -> DataSplits:
    """Load CIFAR-10 from ``data.root``: pickles or ``{train,test}/CLASS/*``; download it if there is neither.

    The arguments are those of :func:`fastalex.data.datasets.load_splits`.

    Raises:
        DataError: files are missing or damaged, or the download fails.
    """
    root = Path(config.root).expanduser()
    batches = _find_batches(root)
    skipped, source = 0, "CIFAR-10"
    if not holds_cifar10(config.root):
        batches = _download(root, config)
    if batches is not None:
        train, test = (_load_batches(batches, config, train=part) for part in (True, False))
    else:
        if not (root / "test").is_dir():
            raise DataError(f"data.root={config.root} has train but no test folder; add test/CLASS/*")
        parts = {part: scan_classes(root / part, CLASSES, config) for part in ("train", "test")}
        images, skipped = read_parts(root, parts, CLASSES, config, progress=progress)
        train, test = images["train"], images["test"]
        if any(path.lower().endswith((".jpg", ".jpeg")) for path in parts["test"].paths):
            source = "CIFAR-10 (JPEG copy)"  # re-encoded: its pixels differ from the published ones
    what = f"data.root={config.root}"
    train, validation = split(train, config.validation_fraction, seed, classes=CLASSES, what=what)
    return DataSplits(train, validation, test, CLASSES, skipped, source=source)


def holds_cifar10(root: str) -> bool:
    """Return whether a folder has the pickles or a ``train`` folder, so that nothing has to be downloaded."""
    folder = Path(root).expanduser()
    return _find_batches(folder) is not None or (folder / "train").is_dir()


def _find_batches(root: Path) -> Path | None:
    for folder in (root / _BATCHES, root):
        if (folder / "data_batch_1").is_file() or (folder.name == _BATCHES and folder.is_dir()):
            return folder
    return None


def _load_batches(folder: Path, config: DataConfig, *, train: bool) -> ImageSet:
    """Load the training or the test pickles. torchvision checks the MD5 of each before it opens any."""
    try:
        batches = _Batches(folder, train=train)
    except (RuntimeError, OSError):
        expected = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        for name, md5 in expected:
            if not _is_whole(folder / name, md5):
                problem = "is not the published file" if (folder / name).exists() else "is missing"
                raise DataError(
                    f"data.root={config.root}: {folder / name} {problem}; restore it, or remove {folder} "
                    "to download all again"
                ) from None
        raise
    labels = np.array(batches.targets, np.int64)
    check_labels(labels, len(CLASSES), what=f"data.root={config.root}")
    return ImageSet(labels, pixels=batches.data)


def _is_whole(path: Path, md5: str) -> bool:
    try:
        return bool(check_integrity(path, md5))
    except OSError:
        return False


def _download(root: Path, config: DataConfig) -> Path:
    """Download the pickles into ``root``, where they appear complete or not at all."""
    remedy = (
        f"put {_BATCHES} or train/CLASS and test/CLASS folders into data.root, point data.root at them, "
        "or use data=digits, which needs no files"
    )
    if root.is_dir() and _has_class_folders(root):
        raise DataError(
            f"data.root={config.root} holds folders of images but no CIFAR-10, which is not downloaded among "
            "them; set data=imagefolder to train on them, or name another folder for CIFAR-10"
        )
    if not config.download:
        raise DataError(f"data.root={config.root} holds no CIFAR-10 and data.download=false; {remedy}")
    lock = cache_folder() / "cifar10-download.lock"
    with suppress(OSError):  # without a lock two processes may both download, which does no harm
        lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        batches = _find_batches(root)  # another process may have downloaded them meanwhile
        if batches is not None:
            return batches
        try:
            with _partial_folder(root) as partial, _socket_timeout():
                CIFAR10(partial, train=False, download=True)
                (partial / _BATCHES).rename(root / _BATCHES)
        except Exception as error:  # network, disk, archive or checksum
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"data.root={config.root} holds no CIFAR-10, and fetching {CIFAR10.url} failed ({reason}); "
                f"{remedy}"
            ) from None
    return root / _BATCHES


def _has_class_folders(root: Path) -> bool:
    """Whether a folder in ``root`` holds images, by their names, which CIFAR-10's does not."""
    for folder in subfolders(root):
        with suppress(OSError):  # one that cannot be read
            if any(entry.name.lower().endswith(image_extensions()) for entry in folder.iterdir()):
                return True
    return False


@contextmanager
def _partial_folder(root: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``root``, and remove it afterwards.

    The leftovers of a killed download are removed too, as is ``root`` itself if it was created here and has
    stayed empty.
    """
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
        try:
            yield partial
        finally:
            shutil.rmtree(partial)
    finally:
        for folder in new:  # innermost first; rmdir fails for one that is not empty, which stays
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """Set a time-out for sockets, because torchvision's download would wait forever for a silent server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
