"""The .beton files of FFCV: the file for a set of images, how it is written and how it is checked.

A file holds labels and raw uint8 pixels of one size. Decoded images are stored in their own size. Image
files are decoded, resized to resize x resize (``data.resize``) as ``data.fit`` says, and rounded to uint8: a
batch is within half a grey level of one resized in floating point, and training decodes no JPEG. FFCV's own
resize while reading (area averaging, up to 102 levels from bilinear) is not used.

The file's name is a digest of everything that its contents depend on. A changed source, another
``data.resize`` or ``data.fit``, or another split into training and validation images gets a file of its own,
so that no outdated file is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastalex.config import DataConfig, Fit, LoaderConfig
from fastalex.data.cache import cache_folder, file_state, locked
from fastalex.data.decode import decode_image
from fastalex.data.fit import fitted
from fastalex.data.imageset import ImageSet
from fastalex.data.workers import map_unordered
from fastalex.errors import DataError, MissingDependencyError, OutputError, ShortageError
from fastalex.files import replacing
from fastalex.runtime import available_cores
from fastalex.shortage import SHARED_MEMORY, shared_memory_free


@contextmanager
def threads_kept() -> Iterator[None]:
    """Restore the numbers of torch and Numba threads, which FFCV's import and each of its loaders change."""
    threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        numba.set_num_threads(numba_threads)


with threads_kept():
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.reader import Reader
        from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, MemoryAllocator, handle_sample
    except ImportError as error:
        raise MissingDependencyError(
            'loader=ffcv needs FFCV, which is not installed: pip install "fastalex[ffcv]" (it is compiled: '
            "first, apt-get install --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config)"
        ) from error

_FORMAT = 2  # version of our files; increase it when the contents for the same images change
_CHUNK = 32  # files per task of a worker process


def ensure_beton(images: ImageSet, data: DataConfig, loader: LoaderConfig) -> Path:
    """Return the path of the .beton file of a split, which is written first if it does not exist.

    If several processes need it at once, one writes and the others wait.

    Args:
        images: the split.
        data: image files are resized to its ``resize``, in pixels, as its ``fit`` says.
        loader: its ``beton`` is the folder of the file; empty: fastalex's cache folder.

    Raises:
        DataError: an image cannot be decoded, or the file is damaged.
        OutputError: the file cannot be written.
        ShortageError: there is too little shared memory to write it.
    """
    folder = Path(loader.beton).expanduser() if loader.beton else cache_folder() / "beton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be created ({error.strerror}); loader.beton=FOLDER says where .beton files go"
        ) from None
    path = folder / f"{_digest(images, data)}.beton"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                for leftover in folder.glob(f".{path.name}.*"):  # from a killed process
                    leftover.unlink(missing_ok=True)
                with replacing(path) as temporary:
                    _write(images, data, temporary, path)
                    check_beton(temporary, images)
    check_beton(path, images)
    return path


def check_beton(path: Path, images: ImageSet) -> None:
    """Check that a file is a complete .beton file with the labels of a split. Pixels are not compared.

    Args:
        path: the file.
        images: the split.

    Raises:
        DataError: the file is unreadable, truncated, of another format, or belongs to other images.
    """
    try:
        reader = Reader(os.fspath(path))
        table, metadata = reader.alloc_table, reader.metadata
        is_whole = (
            reader.field_names == ["image", "label"]
            and len(table) == len(metadata) == reader.num_samples
            and path.stat().st_size == int(reader.header["alloc_table_ptr"]) + table.nbytes
            and int((table["ptr"] + table["size"]).max()) <= int(reader.header["alloc_table_ptr"])
        )
        labels_match = is_whole and np.array_equal(metadata["f1"].reshape(-1), images.labels)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # FFCV's reader does not validate what it reads
        is_whole = False
    if not is_whole:
        raise DataError(f"{path} is not a whole .beton file; delete it, and it will be written again")
    if not labels_match:
        raise DataError(f"{path} was not made from these images; delete it, and it will be written again")


def _digest(images: ImageSet, data: DataConfig) -> str:
    """Return a digest of the labels and of the pixels, or of the files' paths, sizes and times of change."""
    digest = blake2b(f"{_FORMAT}\n".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images.labels).data)
    if images.pixels is not None:
        digest.update(str(images.pixels.shape).encode())
        digest.update(np.ascontiguousarray(images.pixels).data)
        return digest.hexdigest()
    digest.update(f"{data.resize}\n".encode())
    if data.fit is not Fit.square:  # a file that is older than data.fit is square
        digest.update(f"{data.fit.value}\n".encode())
    for path in images.paths or ():
        digest.update(file_state(path, Path(path).absolute()))
    return digest.hexdigest()


def _write(images: ImageSet, data: DataConfig, path: Path, final: Path) -> None:
    """Write all images to ``path``, with a progress bar that names the ``final`` path.

    FFCV's own loop uses several processes and hangs if one of them dies, because of a damaged image or a full
    disk for instance. This is the loop of one of FFCV's workers, in this process; decoding, which takes most
    of the time, is done by worker processes.
    """
    height, width = (data.resize, data.resize) if images.pixels is None else images.pixels.shape[1:3]
    page_size = 4 * MIN_PAGE_SIZE
    while page_size < 8 * height * width * 3:  # the end of a page that holds no whole image is wasted
        page_size *= 2
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    writer = DatasetWriter(os.fspath(path), fields, page_size=page_size, num_workers=1)
    writer.num_samples = len(images)
    free, needed = shared_memory_free(), len(images) * writer.metadata_type.itemsize
    if free is not None and needed > free:
        raise ShortageError(
            f"{final}: is written with {needed:,} bytes of shared memory, and {SHARED_MEMORY} has {free:,} "
            "free; give it more room (docker run --shm-size=1g)"
        )
    writer.prepare()
    try:
        metadata = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type, count=len(images))
        allocator = MemoryAllocator(os.fspath(path), writer.data_region_start, page_size)
        try:
            with (
                allocator,
                tqdm(total=len(images), desc=f"writing {final}", unit="image", disable=None) as bar,
            ):
                for i, pixels in _decoded(images, data):
                    sample = (pixels, images.labels[i])
                    handle_sample(sample, i, writer.metadata_type.names, metadata, allocator, fields)
                    bar.update()
        finally:
            del metadata  # shared memory cannot be closed while a view of it exists
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()


def _decoded(images: ImageSet, data: DataConfig) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield each image, uint8 (H, W, 3), with its index, in any order."""
    if images.pixels is not None:
        yield from enumerate(images.pixels)
        return
    assert images.paths is not None
    chunks = [(images.paths[i : i + _CHUNK], data.resize, data.fit) for i in range(0, len(images), _CHUNK)]
    for number, chunk in map_unordered(_resized, chunks, available_cores()):
        yield from enumerate(chunk, start=number * _CHUNK)


def _resized(task: tuple[tuple[Path | str, ...], int, Fit]) -> NDArray[np.uint8]:
    paths, size, fit = task
    chunk = np.empty((len(paths), size, size, 3), np.uint8)
    for place, path in zip(chunk, paths, strict=True):
        image = torch.from_numpy(decode_image(path)).permute(2, 0, 1).float()
        place[:] = fitted(image, size, fit).round().permute(1, 2, 0).numpy()
    return chunk
