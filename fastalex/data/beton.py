""".beton files, FFCV's format: where one for a set of images lies, how it is written and how it is checked.

A file holds raw uint8 pixels of one size and the labels. Images in memory, which are of one size, keep it.
Image files are decoded and resized to ``data.resize`` squared when they are written, rounded to uint8: so a
batch is within half a grey level of one resized in float, and no training step decodes a JPEG. FFCV's own
resize while reading (area averaging, up to 102 levels from bilinear) is not used.

The file's name is a digest of all that decides its content, so a changed source, another ``data.resize`` or
another division into training and validation images has another file, and a stale one is never read.
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
from torchvision.transforms.v2.functional import resize as resize_image
from tqdm import tqdm

from fastalex.config import DataConfig, LoaderConfig
from fastalex.data.cache import cache_folder, locked
from fastalex.data.decode import decode_image
from fastalex.data.imageset import ImageSet
from fastalex.data.workers import map_unordered
from fastalex.errors import DataError, MissingDependencyError, OutputError
from fastalex.files import replacing
from fastalex.runtime import available_cores


@contextmanager
def threads_kept() -> Iterator[None]:
    """Undoes what FFCV does: its import and each of its loaders set the process's torch and Numba threads."""
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

_FORMAT = 1  # of our files: raise it whenever what is written for the same images changes
_CHUNK = 32  # photographs that a process decodes at a time


def ensure_beton(images: ImageSet, data: DataConfig, loader: LoaderConfig) -> Path:
    """The .beton file of these images, written first if there is none.

    Of several processes that ask at once, one writes and the others wait for it.

    Raises:
        DataError: a photograph cannot be decoded, or the file is damaged.
        OutputError: the file cannot be written.
    """
    folder = Path(loader.beton).expanduser() if loader.beton else cache_folder() / "beton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made ({error.strerror}); loader.beton=FOLDER says where .beton files go"
        ) from None
    path = folder / f"{_digest(images, data.resize)}.beton"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                for leftover in folder.glob(f".{path.name}.*"):  # of a process that was killed
                    leftover.unlink(missing_ok=True)
                with replacing(path) as temporary:
                    _write(images, data.resize, temporary, path)
                    check_beton(temporary, images)
    check_beton(path, images)
    return path


def check_beton(path: Path, images: ImageSet) -> None:
    """Finds a file that is cut short, of another kind or about other images; wrong pixels it does not find.

    Raises:
        DataError: what is wrong with the file.
    """
    try:
        reader = Reader(os.fspath(path))
        table, metadata = reader.alloc_table, reader.metadata
        whole = (
            reader.field_names == ["image", "label"]
            and len(table) == len(metadata) == reader.num_samples
            and path.stat().st_size == int(reader.header["alloc_table_ptr"]) + table.nbytes
            and int((table["ptr"] + table["size"]).max()) <= int(reader.header["alloc_table_ptr"])
        )
        belongs = whole and np.array_equal(metadata["f1"].reshape(-1), images.labels)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # FFCV's reader trusts what it reads
        whole = False
    if not whole:
        raise DataError(f"{path} is not a whole .beton file; delete it, and it will be written again")
    if not belongs:
        raise DataError(f"{path} was not made from these images; delete it, and it will be written again")


def _digest(images: ImageSet, resize: int) -> str:
    """Names the content: of decoded images their pixels, of files their paths, sizes and times of change."""
    digest = blake2b(f"{_FORMAT}\n".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images.labels).data)
    if images.pixels is not None:
        digest.update(str(images.pixels.shape).encode())
        digest.update(np.ascontiguousarray(images.pixels).data)
        return digest.hexdigest()
    digest.update(f"{resize}\n".encode())
    for path in images.paths or ():
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        digest.update(os.fsencode(path.absolute()))
        digest.update(f"\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _write(images: ImageSet, resize: int, path: Path, final: Path) -> None:
    """Writes all images to ``path``, with a progress bar that names the ``final`` path.

    FFCV's own loop spreads the work over processes and waits for ever if one of them dies: of a damaged
    image or a full disk, for instance. So this is the loop of one of its workers, in this process; what takes
    time, decoding, is done by others.
    """
    height, width = (resize, resize) if images.pixels is None else images.pixels.shape[1:3]
    page_size = 4 * MIN_PAGE_SIZE
    while page_size < 8 * height * width * 3:  # what is left over at the end of a page is wasted
        page_size *= 2
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    writer = DatasetWriter(os.fspath(path), fields, page_size=page_size, num_workers=1)
    writer.num_samples = len(images)
    writer.prepare()
    try:
        metadata = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type, count=len(images))
        allocator = MemoryAllocator(os.fspath(path), writer.data_region_start, page_size)
        try:
            with (
                allocator,
                tqdm(total=len(images), desc=f"writing {final}", unit="image", disable=None) as bar,
            ):
                for i, pixels in _decoded(images, resize):
                    sample = (pixels, images.labels[i])
                    handle_sample(sample, i, writer.metadata_type.names, metadata, allocator, fields)
                    bar.update()
        finally:
            del metadata  # shared memory with a view on it cannot be closed
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()


def _decoded(images: ImageSet, resize: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Each image with its position, in any order."""
    if images.pixels is not None:
        yield from enumerate(images.pixels)
        return
    assert images.paths is not None
    chunks = [(images.paths[i : i + _CHUNK], resize) for i in range(0, len(images), _CHUNK)]
    for number, chunk in map_unordered(_resized, chunks, available_cores()):
        yield from enumerate(chunk, start=number * _CHUNK)


def _resized(task: tuple[tuple[Path, ...], int]) -> NDArray[np.uint8]:
    paths, size = task
    chunk = np.empty((len(paths), size, size, 3), np.uint8)
    for place, path in zip(chunk, paths, strict=True):
        image = torch.from_numpy(decode_image(path)).permute(2, 0, 1).float()
        place[:] = resize_image(image, [size, size], antialias=True).round().permute(1, 2, 0).numpy()
    return chunk
